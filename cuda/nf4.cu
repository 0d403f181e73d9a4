/// 4-bit weights: quantising, double quantisation, the device layout and back, decoding a whole matrix.
#include "compat.cuh"
#include "kernels.h"
#include "nf4.cuh"
#include "reduce.cuh"
#include "types.cuh"

// --- Quantising -------------------------------------------------------------------------------------------------------

/// Eight lanes take a block of 64, eight elements each; grid: ceil(n / 64 / 32) blocks of 256 threads.
template <typename T> DEVICE void nf4_quantize(const Nf4Quantize &p) {
    uint64_t block = uint64_t(blockIdx.x) * 32 + threadIdx.x / 8, at = block * 64 + threadIdx.x % 8 * 8;
    bool there = at < p.n;
    constexpr int N = Vec<T>::N;
    float x[8] = {};
    UNROLL
    for (int i = 0; i < 8; i += N) {
        Vec<T> v = {};
        if (there) v = Vec<T>::load(static_cast<const T *>(p.source) + at + i);
        UNROLL
        for (int j = 0; j < N; j++) x[i + j] = v.get(j);
    }
    // As integers, so that NaN counts as larger than infinity and is never lost.
    uint32_t bits = 0;
    UNROLL
    for (int i = 0; i < 8; i++) bits = max(bits, __float_as_uint(x[i]) & 0x7FFFFFFFu);
    UNROLL
    for (int lanes = 4; lanes > 0; lanes /= 2) bits = max(bits, __shfl_xor_sync(0xFFFFFFFFu, bits, lanes));
    if (!there) return;
    float largest = __uint_as_float(bits);
    if (threadIdx.x % 8 == 0) {
        p.absmax[block] = largest;
        if (bits >= 0x7F800000u) atomicAdd(p.bad, 1u);
    }
    // bitsandbytes multiplies by the reciprocal, and of no less than this.
    float reciprocal = __fdiv_rn(1.0f, fmaxf(largest, 1e-38f));
    uint32_t word = 0;
    UNROLL
    for (int i = 0; i < 8; i++) {
        float scaled = x[i] * reciprocal;
        int rank = 0;
        UNROLL
        for (int r = 0; r < 15; r++) rank += p.midpoints[r] < scaled;
        // Byte i / 2, the even element in the high nibble.
        word |= uint32_t(p.order >> 4 * rank & 15) << (i / 2 * 8 + (1 - i % 2) * 4);
    }
    *reinterpret_cast<uint32_t *>(p.codes + at / 2) = word;
}

// static: nf4_quantize expect=load16
KERNELS_FOR_TYPES(nf4_quantize, Nf4Quantize, 256)

// --- Double quantisation ----------------------------------------------------------------------------------------------

/// Additions side by side: 4 rows of 8 lanes.
constexpr uint32_t MEAN_WIDTH = 32;

DEVICE uint32_t ceil_log2(uint64_t x) {
    uint32_t bits = 1;
    while (bits < 64 && uint64_t(1) << bits < x) bits++;
    return bits;
}

/// PyTorch's cascade sum, as src/quant/nested.rs describes it: 32 running sums side by side (a lane each), added up to four
/// levels, every 2^power rows into the next. One block of 1024 threads: 32 warps sum 32 stretches of 2^power rows at a time, warp
/// 0 carries them up. Shared memory: 4096 + 128 bytes.
// static: nf4_absmax_mean shared=4224
KERNEL(nf4_absmax_mean, Nf4Mean, 1024) {
    SHARED_MEMORY(float, shared);
    float *stretch = shared, *total = shared + 32 * MEAN_WIDTH;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float *x = p.absmax;
    if (p.n < 8) {
        // Too few for vectors: PyTorch's order then is the same with vectors of one.
        if (threadIdx.x == 0) {
            uint32_t n = uint32_t(p.n), start = n >= 4 ? 1 : 0, rest = n >= 4 ? 4 : 0;
            float sum = start ? x[0] : 0.0f;
            for (uint32_t i = rest; i < n; i++) sum += x[i];
            for (uint32_t i = start; i < rest; i++) sum += x[i];
            *p.offset = __fdiv_rn(sum, float(n));
        }
        return;
    }
    uint64_t rows = p.n / MEAN_WIDTH;
    uint32_t power = max(ceil_log2(rows) / 4, 4u);
    uint64_t step = uint64_t(1) << power, stretches = rows / step;
    float level[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (uint64_t base = 0; base < stretches; base += 32) {
        if (base + warp < stretches) {
            const float *from = x + (base + warp) * step * MEAN_WIDTH + lane;
            float sum = 0.0f;
            for (uint64_t r = 0; r < step; r += 16) {
                float row[16];
                UNROLL
                for (int i = 0; i < 16; i++) row[i] = from[(r + i) * MEAN_WIDTH];
                UNROLL
                for (int i = 0; i < 16; i++) sum += row[i];
            }
            stretch[threadIdx.x] = sum;
        }
        __syncthreads();
        if (warp == 0) {
            uint32_t here = uint32_t(min(uint64_t(32), stretches - base));
            for (uint32_t i = 0; i < here; i++) {
                uint64_t done = (base + i + 1) * step;
                level[1] += stretch[i * MEAN_WIDTH + lane];
                if (done & (step - 1) << power) continue;
                level[2] += level[1];
                level[1] = 0.0f;
                if (done & (step - 1) << 2 * power) continue;
                level[3] += level[2];
                level[2] = 0.0f;
            }
        }
        __syncthreads();
    }
    if (warp == 0) {
        for (uint64_t r = stretches * step; r < rows; r++) level[0] += x[r * MEAN_WIDTH + lane];
        total[lane] = ((level[0] + level[1]) + level[2]) + level[3];
    }
    __syncthreads();
    if (threadIdx.x < 8) {
        float sum = total[lane];
        uint64_t vectors = p.n / 8;
        for (uint64_t v = rows * 4; v < vectors; v++) sum += x[v * 8 + lane];
        for (uint32_t row = 1; row < 4; row++) sum += total[row * 8 + lane];
        stretch[lane] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (uint64_t i = p.n / 8 * 8; i < p.n; i++) sum += x[i];
        for (uint32_t i = 0; i < 8; i++) sum += stretch[i];
        *p.offset = __fdiv_rn(sum, float(p.n));
    }
}

/// A thread block for 256 scales. Shared memory: (256 + 32) floats.
// static: nf4_absmax_codes shared=1152
KERNEL(nf4_absmax_codes, Nf4QuantizeAbsmax, 256) {
    SHARED_MEMORY(float, shared);
    float *midpoints = shared, *scratch = shared + 256;
    if (threadIdx.x < 255) midpoints[threadIdx.x] = 0.5f * (p.map[threadIdx.x] + p.map[threadIdx.x + 1]);
    uint64_t i = uint64_t(blockIdx.x) * 256 + threadIdx.x;
    float centred = i < p.n ? p.absmax[i] - *p.offset : 0.0f;
    float largest = block_max(fabsf(centred), scratch); // its barriers publish the midpoints too
    if (threadIdx.x == 0) p.nested[blockIdx.x] = largest;
    if (i >= p.n) return;
    uint32_t code = 0;
    if (largest != 0.0f) {
        // bitsandbytes looks the nearest value up in 65,536 steps from -1 to 1.
        float x = fminf(fmaxf(centred * __fdiv_rn(1.0f, largest), -1.0f), 1.0f);
        uint32_t step = uint32_t(fmaf((x + 1.0f) * 0.5f, 65535.0f, 0.5f));
        float value = __fadd_rn(-1.0f, __fdiv_rn(2.0f * float(step), 65535.0f));
        // The number of midpoints below it.
        UNROLL
        for (uint32_t half = 128; half > 0; half /= 2) code += midpoints[code + half - 1] < value ? half : 0;
    }
    p.codes[i] = uint8_t(code);
}

// --- The device layout and back ---------------------------------------------------------------------------------------

/// A chunk of 4 outputs x 8 inputs a thread; grid: ceil(groups * 8 * K / 8 / 256) blocks of 256 threads.
template <bool PACK> DEVICE void nf4_repack(const Nf4Pack &p) {
    uint32_t per_row = p.inputs / 8;
    uint64_t i = uint64_t(blockIdx.x) * 256 + threadIdx.x;
    uint32_t row = uint32_t(i / per_row), column = uint32_t(i % per_row); // of chunks
    uint32_t group = row / 8, og = row % 8;
    if (group >= (p.outputs + 31) / 32) return;
    uint32_t *chunk = p.packed + nf4_block_offset(group, column / 4, p.inputs) / 4 + nf4_slot(og, column % 4) * 4;
    uint32_t word[4] = {0, 0, 0, 0};
    if (!PACK) {
        UNROLL
        for (int j = 0; j < 4; j++) word[j] = chunk[j];
    }
    UNROLL
    for (uint32_t o = 0; o < 4; o++) {
        uint32_t n = 4 * row + o;
        uint32_t *plain = reinterpret_cast<uint32_t *>(p.plain) + uint64_t(n) * per_row + column;
        uint32_t codes = PACK ? n < p.outputs ? *plain : p.zero * 0x11111111u : 0;
        UNROLL
        for (uint32_t k = 0; k < 8; k++) {
            uint32_t at = k / 2 * 8 + (1 - k % 2) * 4;                                        // in a plain word
            uint32_t w = k / 4 * 2 + o / 2, to = k % 4 / 2 * 16 + o % 2 * 8 + k % 2 * 4; // in the chunk
            if (PACK) word[w] |= uint32_t(p.numbers >> 4 * (codes >> at & 15) & 15) << to;
            else codes |= uint32_t(p.numbers >> 4 * (word[w] >> to & 15) & 15) << at;
        }
        if (!PACK && n < p.outputs) *plain = codes;
    }
    if (PACK) {
        UNROLL
        for (int j = 0; j < 4; j++) chunk[j] = word[j];
    }
}

KERNEL(nf4_pack, Nf4Pack, 256) { nf4_repack<true>(p); }
KERNEL(nf4_unpack, Nf4Pack, 256) { nf4_repack<false>(p); }

/// A scale a thread, in packed order; grid: ceil(groups * ceil(K / 256) * 128 / 256) blocks of 256 threads.
template <typename S, bool PACK> DEVICE void nf4_repack_absmax(const Nf4PackAbsmax &p) {
    uint32_t quads = (p.inputs + 255) / 256;
    uint64_t i = uint64_t(blockIdx.x) * 256 + threadIdx.x;
    uint32_t n = uint32_t(i / 128 / quads) * 32 + uint32_t(i / 4 % 32);
    uint32_t kb = uint32_t(i / 128 % quads) * 4 + uint32_t(i % 4);
    if (n >= (p.outputs + 31) / 32 * 32) return;
    bool real = n < p.outputs && kb < p.inputs / 64;
    S *plain = static_cast<S *>(p.plain) + uint64_t(n) * (p.inputs / 64) + kb;
    S *packed = static_cast<S *>(p.packed) + i;
    if (PACK) *packed = real ? *plain : S(0);
    else if (real) *plain = *packed;
}

KERNEL(nf4_pack_absmax_flat, Nf4PackAbsmax, 256) { nf4_repack_absmax<float, true>(p); }
KERNEL(nf4_unpack_absmax_flat, Nf4PackAbsmax, 256) { nf4_repack_absmax<float, false>(p); }
KERNEL(nf4_pack_absmax_nested, Nf4PackAbsmax, 256) { nf4_repack_absmax<uint8_t, true>(p); }
KERNEL(nf4_unpack_absmax_nested, Nf4PackAbsmax, 256) { nf4_repack_absmax<uint8_t, false>(p); }

// --- Decoding ---------------------------------------------------------------------------------------------------------

/// A warp takes 32 outputs x 128 inputs in four turns of 8 outputs, so that a turn reads whole lines of 128 bytes and writes 256
/// bytes (of 16-bit T) of each row; grid: [ceil(K / 1024), ceil(N / 32)] blocks of 256 threads. Shared memory: (256 + 16) floats.
template <typename T> DEVICE void nf4_dequantize(const Nf4Dequantize &p) {
    SHARED_MEMORY(float, shared);
    float *map = shared, *values = shared + 256;
    const Nf4Weight &w = p.w;
    uint32_t lane = threadIdx.x % 32;
    // A half-warp has a row of chunks: 16 of 8 inputs.
    uint32_t column = (blockIdx.x * 8 + threadIdx.x / 32) * 16 + lane % 16;
    bool inside = column < w.inputs / 8;
    const uint8_t *block = reinterpret_cast<const uint8_t *>(w.codes) +
                           nf4_block_offset(w.first / 32 + blockIdx.y, inside ? column / 4 : 0, w.inputs);
    U128 chunk[4];
    UNROLL
    for (uint32_t turn = 0; turn < 4; turn++)
        chunk[turn] = load_stream_16(block + nf4_slot(turn * 2 + lane / 16, column % 4) * 16);
    nf4_load_map(w, map, threadIdx.x, 256);
    if (threadIdx.x < 16) values[threadIdx.x] = p.values[threadIdx.x];
    __syncthreads();
    if (!inside) return;
    UNROLL
    for (uint32_t turn = 0; turn < 4; turn++) {
        UNROLL
        for (uint32_t o = 0; o < 4; o++) {
            uint32_t n = blockIdx.y * 32 + (turn * 2 + lane / 16) * 4 + o;
            if (n >= w.outputs) continue;
            float scale = nf4_scale(w, nf4_load_scale(w, nf4_scale_row(w, n), column / 8), map);
            T *out = static_cast<T *>(p.out) + uint64_t(n) * w.inputs + column * 8;
            constexpr int N = Vec<T>::N;
            UNROLL
            for (int half = 0; half < 8; half += N) {
                Vec<T> v = {};
                UNROLL
                for (int i = 0; i < N; i++) {
                    int k = half + i;
                    uint32_t code = k < 4 ? nf4_nibble(chunk[turn].x, chunk[turn].y, o, k)
                                          : nf4_nibble(chunk[turn].z, chunk[turn].w, o, k - 4);
                    v.set(i, __fmul_rn(values[code], scale));
                }
                v.store(out + half);
            }
        }
    }
}

// static: nf4_dequantize shared=1088 expect=load16
KERNELS_FOR_TYPES(nf4_dequantize, Nf4Dequantize, 256)
