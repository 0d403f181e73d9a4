/// AdamW whose moments are kept in 8 bits, in blocks of 256 with one scale each.
#include "compat.cuh"
#include "kernels.h"
#include "optim.cuh"
#include "reduce.cuh"
#include "span.cuh"
#include "types.cuh"

/// Neighbouring elements of a lane: 16 bytes of floats, 4 of codes.
constexpr int SPAN = 4;
/// How many such spans a lane has of a block: neighbouring lanes own neighbouring spans.
constexpr int SPANS = GLM_BLOCK_8BIT / (32 * SPAN);

DEVICE void load_codes(uint32_t (&codes)[SPAN], const uint8_t *from, uint32_t left) {
    const uint32_t word = left >= SPAN ? *reinterpret_cast<const uint32_t *>(from) : 0;
    UNROLL
    for (int j = 0; j < SPAN; j++) {
        codes[j] = left >= SPAN ? word >> (8 * j) & 0xFFu : uint32_t(j) < left ? from[j] : 0;
    }
}

DEVICE void store_codes(uint8_t *to, const uint32_t (&codes)[SPAN], uint32_t left) {
    if (left >= SPAN) {
        *reinterpret_cast<uint32_t *>(to) = codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24;
        return;
    }
    UNROLL
    for (int j = 0; j < SPAN; j++) {
        if (uint32_t(j) < left) {
            to[j] = uint8_t(codes[j]);
        }
    }
}

/// How many of the 255 ascending midpoints lie below `x`: the code of the nearest value, the lower one of two.
DEVICE uint32_t nearest(float x, const float *midpoints) {
    uint32_t code = 0;
    UNROLL
    for (uint32_t half = 128; half > 0; half /= 2) {
        code += midpoints[code + half - 1] < x ? half : 0;
    }
    return code;
}

/// Each block: one chunk; each warp: every eighth block of 256 moments. Shared memory: the maps.
// static: adamw_8bit shared=4096
KERNEL(adamw_8bit, Adamw8bit, GLM_OPTIM_THREADS) {
    SHARED_MEMORY(float, shared);
    const float *maps = reinterpret_cast<const float *>(p.maps);
    for (uint32_t i = threadIdx.x; i < sizeof(Maps8bit) / sizeof(float); i += blockDim.x) {
        shared[i] = maps[i];
    }
    __syncthreads();
    const float *m_map = shared, *m_midpoints = shared + 256;
    const float *v_map = shared + 512, *v_midpoints = shared + 768;

    const Adamw8bitChunk chunk = p.chunks[blockIdx.x];
    const uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const bool aligned = aligned_16(chunk.p, chunk.g);
    const uint32_t blocks = (chunk.n + GLM_BLOCK_8BIT - 1) / GLM_BLOCK_8BIT;
    for (uint32_t block = threadIdx.x / 32; block < blocks; block += warps) {
        const uint32_t start = block * GLM_BLOCK_8BIT + lane * SPAN;
        const float m_absmax = chunk.m_absmax[block], v_absmax = chunk.v_absmax[block];
        float m[SPANS][SPAN], v[SPANS][SPAN];
        float m_largest = 0.0f, v_largest = 0.0f;
        UNROLL
        for (int s = 0; s < SPANS; s++) {
            const uint32_t i = start + s * 32 * SPAN;
            const uint32_t left = i < chunk.n ? chunk.n - i : 0;
            uint32_t m_codes[SPAN], v_codes[SPAN];
            load_codes(m_codes, chunk.m + i, left);
            load_codes(v_codes, chunk.v + i, left);
            by_access(aligned && left >= SPAN, [&](auto access) {
                float value[SPAN], g[SPAN];
                access.load(value, chunk.p + i, left);
                access.load(g, chunk.g + i, left);
                UNROLL
                for (int j = 0; j < SPAN; j++) {
                    m[s][j] = __fmul_rn(m_map[m_codes[j]], m_absmax);
                    v[s][j] = __fmul_rn(v_map[v_codes[j]], v_absmax);
                    adamw_element(value[j], g[j], m[s][j], v[s][j], chunk.decay, chunk.step_size, p.factors);
                    // What lies past the end does not count.
                    if (uint32_t(j) < left) {
                        m_largest = fmaxf(m_largest, fabsf(m[s][j]));
                        v_largest = fmaxf(v_largest, v[s][j]);
                    }
                }
                access.store(chunk.p + i, value, left);
            });
        }
        m_largest = warp_max(m_largest);
        v_largest = warp_max(v_largest);
        // A block of zeros: any scale finds the code of 0.
        const float m_scale = m_largest > 0.0f ? m_largest : 1.0f;
        const float v_scale = v_largest > 0.0f ? v_largest : 1.0f;
        UNROLL
        for (int s = 0; s < SPANS; s++) {
            const uint32_t i = start + s * 32 * SPAN;
            const uint32_t left = i < chunk.n ? chunk.n - i : 0;
            uint32_t m_codes[SPAN], v_codes[SPAN];
            UNROLL
            for (int j = 0; j < SPAN; j++) {
                m_codes[j] = nearest(__fdiv_rn(m[s][j], m_scale), m_midpoints);
                v_codes[j] = nearest(__fdiv_rn(v[s][j], v_scale), v_midpoints);
            }
            store_codes(chunk.m + i, m_codes, left);
            store_codes(chunk.v + i, v_codes, left);
        }
        if (lane == 0) {
            chunk.m_absmax[block] = m_largest;
            chunk.v_absmax[block] = v_largest;
        }
    }
}
