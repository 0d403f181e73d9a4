/// Products with 4-bit weights in f32, for tests and for whoever asks for f32: a weight is f32 code times f32 scale as in
/// bitsandbytes, a sum is one thread's, in order. Right before fast.
#include "compat.cuh"
#include "kernels.h"
#include "nf4.cuh"
#include "types.cuh"

constexpr uint32_t TILE = GLM_NF4_F32_TILE;
/// Reduced elements of a step: a block of the weights.
constexpr uint32_t DEPTH = 32;
/// Floats between two reduced elements of a tile; the pad keeps rows at 16 bytes and spreads columns over the banks.
constexpr uint32_t PITCH = TILE + 4;
static_assert(GLM_NF4_F32_SHARED == 2 * DEPTH * PITCH * 4 + (256 + 16) * 4, "kernels.h says what is asked for");

/// A tile of 64 rows x 64 columns, 256 threads with 4 x 4 each; grid: [ceil(columns / 64), ceil(M / 64)].
template <bool BACKWARD> DEVICE void nf4_linear_f32(const Nf4Linear &p) {
    SHARED_MEMORY(float, shared);
    float *in = shared, *weights = in + DEPTH * PITCH, *map = weights + DEPTH * PITCH, *values = map + 256;
    const Nf4Weight &w = p.w;
    uint32_t reduced = BACKWARD ? w.outputs : w.inputs, width = BACKWARD ? w.inputs : w.outputs;
    uint32_t row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    uint32_t tx = threadIdx.x % 16 * 4, ty = threadIdx.x / 16 * 4;
    nf4_load_map(w, map, threadIdx.x, GLM_NF4_F32_THREADS);
    if (threadIdx.x < 16) values[threadIdx.x] = p.values[threadIdx.x];
    // A word (2 outputs x 4 inputs) of the two blocks of a step is this thread's.
    uint32_t part = threadIdx.x % 2, is = threadIdx.x / 2 % 8, og = threadIdx.x / 16 % 8, second = threadIdx.x / 128;
    float sum[4][4] = {};
    for (uint32_t k0 = 0; k0 < reduced; k0 += DEPTH) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < TILE * DEPTH; i += GLM_NF4_F32_THREADS) {
            uint32_t row = row0 + i / DEPTH, k = k0 + i % DEPTH;
            bool real = row < p.m && k < reduced;
            in[i % DEPTH * PITCH + i / DEPTH] = real ? static_cast<const float *>(p.in)[uint64_t(row) * reduced + k] : 0.0f;
        }
        uint32_t group = (BACKWARD ? k0 : column0) / 32 + (BACKWARD ? 0 : second);
        uint32_t block = (BACKWARD ? column0 : k0) / 32 + (BACKWARD ? second : 0);
        bool there = group * 32 < w.outputs;
        uint32_t word = 0;
        if (there) word = w.codes[nf4_block_offset(w.first / 32 + group, block, w.inputs) / 4 + nf4_slot(og, is / 2) * 4 +
                                  is % 2 * 2 + part];
        UNROLL
        for (uint32_t o = 0; o < 2; o++) {
            uint32_t output = 4 * og + 2 * part + o, n = group * 32 + output;
            float scale = there ? nf4_scale(w, nf4_load_scale(w, nf4_scale_row(w, n), block / 2), map) : 0.0f;
            UNROLL
            for (uint32_t i = 0; i < 4; i++) {
                float v = __fmul_rn(values[nf4_nibble(word, word, o, i)], scale);
                if (BACKWARD) weights[output * PITCH + second * 32 + 4 * is + i] = v;
                else weights[(4 * is + i) * PITCH + second * 32 + output] = v;
            }
        }
        __syncthreads();
        for (uint32_t k = 0; k < DEPTH; k++) {
            Vec<float> a = Vec<float>::load(in + k * PITCH + ty), b = Vec<float>::load(weights + k * PITCH + tx);
            UNROLL
            for (int i = 0; i < 4; i++) {
                UNROLL
                for (int j = 0; j < 4; j++) sum[i][j] += a.get(i) * b.get(j);
            }
        }
    }
    UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        UNROLL
        for (uint32_t j = 0; j < 4; j++) {
            uint32_t row = row0 + ty + i, column = column0 + tx + j;
            if (row >= p.m || column >= width) continue;
            float v = sum[i][j], more = 0.0f;
            for (uint32_t r = 0; p.u && r < p.rank; r++)
                more += static_cast<const float *>(p.u)[uint64_t(row) * p.rank + r] *
                        p.lora[BACKWARD ? uint64_t(r) * width + column : uint64_t(column) * p.rank + r];
            v += p.lora_scale * more;
            uint64_t at = uint64_t(row) * width + column;
            if (p.bias) v += p.bias[column];
            if (p.residual) v += p.alpha * static_cast<const float *>(p.residual)[at];
            static_cast<float *>(p.out)[at] = v;
        }
    }
}

// static: nf4_linear_forward_f32 shared=18496
// static: nf4_linear_backward_f32 shared=18496
KERNEL(nf4_linear_forward_f32, Nf4Linear, GLM_NF4_F32_THREADS) { nf4_linear_f32<false>(p); }
KERNEL(nf4_linear_backward_f32, Nf4Linear, GLM_NF4_F32_THREADS) { nf4_linear_f32<true>(p); }
