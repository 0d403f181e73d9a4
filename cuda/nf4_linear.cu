/// Products with 4-bit weights for many rows: y = x Wᵀ and dx = dy W from the same packed words, decoded straight into the
/// registers of mma; the decoded matrix is never in memory.
///
/// Both directions are one template: the reduced dimension is the other, and a lane reads other words of a block and pairs
/// them the other way (nf4.cuh). Numbers: a weight is T(table entry) * T(scale), rounded once to T (2.9 instructions a weight
/// with decoding); sums are f32. With random weights the root mean square of the error, relative to f32 decoding, is
/// 2.6e-3 (bf16) and 2.9e-4 (f16); NF4's own is 9e-2. f16 scales are multiplied by a power of two (`pre`, undone by `post`), so that
/// blocks of tiny weights keep their digits.
#include "compat.cuh"
#include "kernels.h"
#include "nf4.cuh"
#include "types.cuh"

/// Warps of a tile, beside each other along the columns: each decodes its own 32 columns, so no weight is decoded twice.
constexpr uint32_t WARPS = GLM_NF4_TILE_COLUMNS / 32;
constexpr uint32_t STEP = GLM_NF4_TILE_STEP;
constexpr uint32_t STAGES = 2;
constexpr uint32_t CODE_BYTES = GLM_NF4_TILE_COLUMNS * STEP / 2;
static_assert(GLM_NF4_TILE_THREADS == WARPS * 32, "a warp for every 32 columns");

/// Shared memory of a tile of 16 * MT rows: two stages of activations and codes, two of scales, the map.
template <int MT> struct Places {
    static constexpr uint32_t CODES = 16 * MT * STEP * 2; // in a stage, after the activations
    static constexpr uint32_t STAGE = CODES + CODE_BYTES;
    static constexpr uint32_t SCALES = STAGES * STAGE;
    static constexpr uint32_t MAP = SCALES + 2 * GLM_NF4_TILE_COLUMNS * 2;
    static constexpr uint32_t ALL = MAP + 1024;
};
static_assert(Places<GLM_NF4_TILE_ROWS / 16>::ALL == GLM_NF4_TILE_SHARED, "kernels.h says what is asked for");
static_assert(Places<GLM_NF4_TILE_ROWS_SHORT / 16>::ALL == GLM_NF4_TILE_SHARED_SHORT, "kernels.h says what is asked for");

/// Eight elements of a row that may start anywhere; zeros from `count` on.
template <typename T> DEVICE U128 load_ragged(const T *from, uint32_t count) {
    uint32_t word[4] = {0, 0, 0, 0};
    UNROLL
    for (uint32_t i = 0; i < 8; i++)
        if (i < count) word[i / 2] |= uint32_t(from[i].bits) << i % 2 * 16;
    return U128{word[0], word[1], word[2], word[3]};
}

/// One thread block: rows [16 MT blockIdx.y, ..), columns [128 blockIdx.x, ..), part blockIdx.z of the reduction.
template <typename T, bool BACKWARD, int MT> struct Tile {
    typedef Places<MT> At;
    const Nf4Linear &p;
    uint8_t *shared;
    uint32_t warp, g, t;
    uint32_t row0, column0;
    uint32_t reduced, width; // extents: the reduced dimension, the columns of the output
    Nf4Tables tables;
    float sum[2 * MT][2][4]; // 8 rows, 16 columns each

    // What this thread copies in a step: one chunk of 16 bytes of every 16th row, and two of codes.
    const T *in;
    const uint8_t *codes[2];
    uint32_t in_place, codes_place;
    Nf4ScaleRow scale_row; // forward
    // Where its fragments lie in a stage.
    uint32_t in_lane, codes_lane[2], scales_lane;

    DEVICE Tile(const Nf4Linear &p, uint8_t *shared) : p(p), shared(shared) {
        uint32_t thread = threadIdx.x, lane = thread % 32;
        warp = thread / 32;
        g = lane / 4;
        t = lane % 4;
        row0 = blockIdx.y * 16 * MT;
        column0 = blockIdx.x * GLM_NF4_TILE_COLUMNS;
        reduced = BACKWARD ? p.w.outputs : p.w.inputs;
        width = BACKWARD ? p.w.inputs : p.w.outputs;
        // The look-up tables through a shuffle: parameters that ptxas can recognise it moves to a register again for every
        // look-up, an instruction a weight.
        uint32_t word = lane / 4 % 2 ? p.planes.high[lane % 4] : p.planes.low[lane % 4];
        UNROLL
        for (int i = 0; i < 4; i++) {
            tables.low[i] = __shfl_sync(0xFFFFFFFFu, word, i);
            tables.high[i] = __shfl_sync(0xFFFFFFFFu, word, i + 4);
        }
        UNROLL
        for (int i = 0; i < 2 * MT; i++) {
            UNROLL
            for (int j = 0; j < 2; j++) {
                UNROLL
                for (int k = 0; k < 4; k++) sum[i][j][k] = 0.0f;
            }
        }
        // A row of a stage is 8 chunks of 16 bytes; the halves of odd rows change places, so that the eight lanes of a 16-byte
        // read (two rows x four chunks) meet in no bank.
        uint32_t chunk = thread % 8, row = thread / 8;
        in = static_cast<const T *>(p.in) + uint64_t(row0 + row) * reduced + chunk * 8;
        in_place = row * 128 + (chunk ^ (row & 1) * 4) * 16;
        in_lane = g * 128 + (t + (g & 1) * 4) * 16;
        // Codes of a step: forward 4 groups x 1024 bytes, a warp its group; backward 2 groups x 2048 bytes.
        uint32_t group = p.w.first / 32, block = 0;
        uint32_t within = BACKWARD ? thread * 16 : lane * 16;
        if (BACKWARD) block = column0 / 32 + within / NF4_BLOCK_BYTES;
        else group += column0 / 32 + warp;
        for (uint32_t i = 0; i < 2; i++) {
            codes[i] = reinterpret_cast<const uint8_t *>(p.w.codes) +
                       nf4_block_offset(group + (BACKWARD ? i : 0), block + (BACKWARD ? 0 : i), p.w.inputs) +
                       within % NF4_BLOCK_BYTES;
            codes_lane[i] = BACKWARD ? warp * NF4_BLOCK_BYTES + nf4_slot(2 * t + i, g / 2) * 16 + g % 2 * 8
                                     : warp * 1024 + i * NF4_BLOCK_BYTES + nf4_slot(g, t) * 16;
        }
        if (!BACKWARD) scale_row = nf4_scale_row(p.w, column0 + thread);
        codes_place = BACKWARD ? within : warp * 1024 + within;
        scales_lane = (BACKWARD ? warp / 2 * 64 + 8 * t : warp * 32 + 4 * g) * 2;
        if (!BACKWARD) {
            // Or the loop would compute them again in every step; backward registers are too few.
            in_lane = keep(in_lane);
            codes_lane[0] = keep(codes_lane[0]);
            codes_lane[1] = codes_lane[0] + NF4_BLOCK_BYTES;
            scales_lane = keep(scales_lane);
        }
    }

    DEVICE float *map() const { return reinterpret_cast<float *>(shared + At::MAP); }

    /// Starts the copies of one step: 16 MT x 64 activations, 128 x 64 codes.
    DEVICE void copy(uint32_t step) const {
        constexpr uint32_t STRIDE = GLM_NF4_TILE_THREADS / 8;
        uint8_t *to = shared + step % 2 * At::STAGE;
        uint32_t row = row0 + threadIdx.x / 8, k = step * STEP + threadIdx.x % 8 * 8;
        const T *from = in + step * STEP;
        if (!BACKWARD || reduced % 8 == 0) {
            UNROLL
            for (uint32_t i = 0; i < 16 * MT / STRIDE; i++)
                cp_async_16(to + in_place + i * STRIDE * 128, from + uint64_t(i * STRIDE) * reduced,
                            row + i * STRIDE < p.m && k < reduced);
        } else { // rows do not start at 16 bytes
            for (uint32_t i = 0; i < 16 * MT / STRIDE; i++) {
                bool real = row + i * STRIDE < p.m && k < reduced;
                store_16(to + in_place + i * STRIDE * 128,
                         load_ragged(from + uint64_t(i * STRIDE) * reduced, real ? reduced - k : 0));
            }
        }
        uint32_t groups = (p.w.outputs + 31) / 32, blocks = p.w.inputs / 32;
        UNROLL
        for (uint32_t i = 0; i < 2; i++) {
            bool real = BACKWARD ? step * 2 + i < groups && column0 / 32 + warp < blocks : column0 / 32 + warp < groups;
            uint64_t offset = BACKWARD ? uint64_t(step) * blocks * 2 * NF4_BLOCK_BYTES : step * 2 * NF4_BLOCK_BYTES;
            cp_async_16(to + At::CODES + codes_place + i * (BACKWARD ? 2048 : NF4_BLOCK_BYTES), codes[i] + offset, real);
        }
        cp_async_commit();
    }

    /// This thread's scale of a step: forward of output column0 + thread, backward of one of 64 outputs x 2 blocks of inputs.
    DEVICE Nf4RawScale load_scale(uint32_t step) const {
        uint32_t last = p.w.inputs / 64 - 1;
        if (!BACKWARD) return nf4_load_scale(p.w, scale_row, min(step, last));
        Nf4ScaleRow row = nf4_scale_row(p.w, step * 64 + threadIdx.x % 64);
        return nf4_load_scale(p.w, row, min(column0 / 64 + threadIdx.x / 64, last));
    }
    DEVICE void store_scale(uint32_t step, Nf4RawScale raw) const {
        T *to = reinterpret_cast<T *>(shared + At::SCALES) + step % 2 * GLM_NF4_TILE_COLUMNS;
        to[threadIdx.x] = from_float<T>(nf4_scale(p.w, raw, map()) * p.planes.pre);
    }

    /// sum += w in, for the fragments w[step][16 columns] and 8 rows of `in` after the other, of which each lane reads 16 bytes:
    /// its share of both steps.
    DEVICE void multiply_8(int i, U128 in, const uint32_t (&w)[2][2][4]) {
        uint32_t first[2] = {in.x, in.y}, second[2] = {in.z, in.w};
        mma_16x8x16<T>(sum[i][0], w[0][0], first);
        mma_16x8x16<T>(sum[i][1], w[0][1], first);
        mma_16x8x16<T>(sum[i][0], w[1][0], second);
        mma_16x8x16<T>(sum[i][1], w[1][1], second);
    }

    /// A patch as fragments of mma's operand a: row g of tile j is column 4g + 2j of the output, row g + 8 the next.
    DEVICE void decode(uint32_t word0, uint32_t word1, const uint32_t (&scale)[4], uint32_t (&w)[2][4]) {
        uint32_t pair[4][2];
        nf4_decode_patch<BACKWARD>(word0, word1, tables, pair);
        UNROLL
        for (int j = 0; j < 4; j++) {
            UNROLL
            for (int b = 0; b < 2; b++) w[j / 2][j % 2 + 2 * b] = mul2<T>(pair[j][b], scale[BACKWARD ? b : j]);
        }
    }

    /// One step of 64: two blocks of 32 reduced elements.
    DEVICE void compute(uint32_t step) {
        const uint8_t *stage = shared + step % 2 * At::STAGE, *code = stage + At::CODES;
        const uint8_t *scales = shared + At::SCALES + step % 2 * (GLM_NF4_TILE_COLUMNS * 2) + scales_lane;
        uint32_t scale[4];
        if (!BACKWARD) {
            U64 s = *reinterpret_cast<const U64 *>(scales);
            scale[0] = prmt(s.x, s.x, 0x1010);
            scale[1] = prmt(s.x, s.x, 0x3232);
            scale[2] = prmt(s.y, s.y, 0x1010);
            scale[3] = prmt(s.y, s.y, 0x3232);
        }
        UNROLL
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t w[2][2][4];
            if (BACKWARD) {
                U128 s = load_16(scales + half * 64);
                U64 patch0 = *reinterpret_cast<const U64 *>(code + half * 2048 + codes_lane[0]);
                U64 patch1 = *reinterpret_cast<const U64 *>(code + half * 2048 + codes_lane[1]);
                uint32_t scale0[4] = {s.x, s.y, 0, 0}, scale1[4] = {s.z, s.w, 0, 0};
                decode(patch0.x, patch0.y, scale0, w[0]);
                decode(patch1.x, patch1.y, scale1, w[1]);
            } else {
                U128 chunk = load_16(code + codes_lane[half]);
                decode(chunk.x, chunk.y, scale, w[0]);
                decode(chunk.z, chunk.w, scale, w[1]);
            }
            UNROLL
            for (int i = 0; i < 2 * MT; i++) multiply_8(i, load_16(stage + (in_lane ^ half * 64) + i * 8 * 128), w);
        }
    }

    /// sum += lora_scale * u lora, in steps of 32 of the rank: fragments straight from memory, once a tile.
    DEVICE void add_lora() {
        for (uint32_t r0 = 0; r0 < p.rank; r0 += 32) {
            uint32_t r = r0 + 8 * t;
            uint32_t w[2][2][4];
            UNROLL
            for (int e = 0; e < 2; e++) {
                UNROLL
                for (int b = 0; b < 2; b++) {
                    UNROLL
                    for (uint32_t j = 0; j < 4; j++) {
                        uint32_t column = column0 + warp * 32 + 4 * g + j, k = r + 4 * e + 2 * b;
                        bool real = column < width;
                        uint64_t at = BACKWARD ? uint64_t(k) * width + column : uint64_t(column) * p.rank + k;
                        float lo = real && k < p.rank ? p.lora[at] : 0.0f;
                        float hi = real && k + 1 < p.rank ? p.lora[at + (BACKWARD ? width : 1)] : 0.0f;
                        w[e][j / 2][j % 2 + 2 * b] = pack2<T>(p.lora_scale * lo, p.lora_scale * hi);
                    }
                }
            }
            UNROLL
            for (int i = 0; i < 2 * MT; i++) multiply_8(i, load_u(row0 + 8 * i + g, r), w);
        }
    }
    DEVICE U128 load_u(uint32_t row, uint32_t r) const {
        if (row >= p.m || r >= p.rank) return U128{0, 0, 0, 0};
        const T *from = static_cast<const T *>(p.u) + uint64_t(row) * p.rank + r;
        return p.rank % 8 == 0 ? load_16(from) : load_ragged(from, p.rank - r);
    }

    /// Four columns of a row, of this lane.
    DEVICE void store(uint32_t row, uint32_t column, const float (&bias)[4], float (&v)[4]) const {
        if (row >= p.m || column >= width) return;
        uint64_t at = uint64_t(row) * width + column;
        bool whole = width % 4 == 0;
        if (!p.out) {
            float *to = p.partial + uint64_t(blockIdx.z) * p.m * width + at;
            if (whole) {
                store_16(to, U128{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])});
            } else {
                UNROLL
                for (uint32_t i = 0; i < 4; i++)
                    if (column + i < width) to[i] = v[i];
            }
            return;
        }
        T *to = static_cast<T *>(p.out) + at;
        const T *residual = static_cast<const T *>(p.residual) + at;
        UNROLL
        for (uint32_t i = 0; i < 4; i++) v[i] += bias[i];
        if (whole) {
            if (p.residual) {
                U64 r = *reinterpret_cast<const U64 *>(residual);
                Float2 lo = unpack2<T>(r.x), hi = unpack2<T>(r.y);
                v[0] += p.alpha * lo.x;
                v[1] += p.alpha * lo.y;
                v[2] += p.alpha * hi.x;
                v[3] += p.alpha * hi.y;
            }
            *reinterpret_cast<U64 *>(to) = U64{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])};
        } else {
            UNROLL
            for (uint32_t i = 0; i < 4; i++) {
                if (column + i >= width) continue;
                to[i] = from_float<T>(p.residual ? v[i] + p.alpha * to_float(residual[i]) : v[i]);
            }
        }
    }

    DEVICE void run() {
        uint32_t steps = (reduced + STEP - 1) / STEP;
        uint32_t begin = steps * blockIdx.z / p.splits, end = steps * (blockIdx.z + 1) / p.splits;
        // Scales are read two steps ahead and made numbers one step ahead.
        if (begin < end) copy(begin);
        Nf4RawScale raw = load_scale(begin);
        nf4_load_map(p.w, map(), threadIdx.x, GLM_NF4_TILE_THREADS);
        __syncthreads();
        store_scale(begin, raw);
        raw = load_scale(begin + 1);
        for (uint32_t step = begin; step < end; step++) {
            cp_async_wait<0>();
            __syncthreads(); // what was copied is there, and everyone has left the stage that is overwritten next
            if (step + 1 < end) {
                copy(step + 1);
                store_scale(step + 1, raw);
                raw = load_scale(step + 2);
            }
            compute(step);
        }
        UNROLL
        for (int i = 0; i < 2 * MT; i++) {
            UNROLL
            for (int j = 0; j < 2; j++) {
                UNROLL
                for (int k = 0; k < 4; k++) sum[i][j][k] *= p.planes.post;
            }
        }
        if (p.u && blockIdx.z == 0) add_lora();
        uint32_t column = column0 + warp * 32 + 4 * g;
        float bias[4];
        UNROLL
        for (uint32_t j = 0; j < 4; j++) bias[j] = p.bias && column + j < width ? p.bias[column + j] : 0.0f;
        UNROLL
        for (int i = 0; i < 2 * MT; i++) {
            UNROLL
            for (int odd = 0; odd < 2; odd++) {
                float v[4] = {sum[i][0][odd], sum[i][0][odd + 2], sum[i][1][odd], sum[i][1][odd + 2]};
                store(row0 + 8 * i + 2 * t + odd, column, bias, v);
            }
        }
    }
};

template <typename T, bool BACKWARD, int MT> DEVICE void nf4_tile(const Nf4Linear &p) {
    SHARED_MEMORY(uint8_t, shared);
    Tile<T, BACKWARD, MT>(p, shared).run();
}

/// Grid: [ceil(columns / 128), ceil(M / rows), splits], 128 threads.
// static: nf4_linear_* threads=128 shared=42496 expect=mma,load16
// static: nf4_linear_forward_short_* threads=128 shared=26112 expect=mma,load16
// static: nf4_linear_backward_short_* threads=128 shared=26112 expect=mma,load16
#define NF4_TILES(suffix, T)                                                                                 \
    KERNEL_MIN(nf4_linear_forward_##suffix, Nf4Linear, GLM_NF4_TILE_THREADS, 2) { nf4_tile<T, false, GLM_NF4_TILE_ROWS / 16>(p); } \
    KERNEL_MIN(nf4_linear_backward_##suffix, Nf4Linear, GLM_NF4_TILE_THREADS, 2) { nf4_tile<T, true, GLM_NF4_TILE_ROWS / 16>(p); } \
    KERNEL_MIN(nf4_linear_forward_short_##suffix, Nf4Linear, GLM_NF4_TILE_THREADS, 3)                            \
    { nf4_tile<T, false, GLM_NF4_TILE_ROWS_SHORT / 16>(p); }                                                     \
    KERNEL_MIN(nf4_linear_backward_short_##suffix, Nf4Linear, GLM_NF4_TILE_THREADS, 3)                           \
    { nf4_tile<T, true, GLM_NF4_TILE_ROWS_SHORT / 16>(p); }

NF4_TILES(f16, half_t)
#if GLM_HAS_BF16
NF4_TILES(bf16, bf16_t)
#endif

// --- Joining parts ----------------------------------------------------------------------------------------------------

/// Four neighbours a thread; grid: ceil(M width / 1024) blocks of 256 threads.
template <typename T> DEVICE void nf4_linear_finish(const Nf4Finish &p) {
    uint64_t n = uint64_t(p.m) * p.width, first = (uint64_t(blockIdx.x) * 256 + threadIdx.x) * 4;
    if (first + 4 <= n && p.width % 4 == 0) {
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (uint32_t s = 0; s < p.splits; s++) {
            Vec<float> part = Vec<float>::load(p.partial + s * n + first);
            UNROLL
            for (int i = 0; i < 4; i++) v[i] += part.get(i);
        }
        if (p.bias) {
            UNROLL
            for (uint32_t i = 0; i < 4; i++) v[i] += p.bias[first % p.width + i];
        }
        if (p.residual) {
            U64 r = *reinterpret_cast<const U64 *>(static_cast<const T *>(p.residual) + first);
            Float2 lo = unpack2<T>(r.x), hi = unpack2<T>(r.y);
            v[0] += p.alpha * lo.x;
            v[1] += p.alpha * lo.y;
            v[2] += p.alpha * hi.x;
            v[3] += p.alpha * hi.y;
        }
        *reinterpret_cast<U64 *>(static_cast<T *>(p.out) + first) = U64{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])};
        return;
    }
    for (uint64_t i = first; i < min(first + 4, n); i++) {
        float v = 0.0f;
        for (uint32_t s = 0; s < p.splits; s++) v += p.partial[s * n + i];
        if (p.bias) v += p.bias[i % p.width];
        if (p.residual) v += p.alpha * to_float(static_cast<const T *>(p.residual)[i]);
        static_cast<T *>(p.out)[i] = from_float<T>(v);
    }
}

// static: nf4_linear_finish threads=256
KERNEL(nf4_linear_finish_f16, Nf4Finish, 256) { nf4_linear_finish<half_t>(p); }
#if GLM_HAS_BF16
KERNEL(nf4_linear_finish_bf16, Nf4Finish, 256) { nf4_linear_finish<bf16_t>(p); }
#endif
