/// Products of 4-bit weights with up to 32 rows: the weights' way through the machine is what counts.
///
/// Weights are mma's operand a (16 outputs x 16 inputs: 8 codes a lane), rows of activations its 8 columns, so that 8 rows cost
/// what one does, and one row needs no multiplications of its own: M = 1 is the 8-row kernel. Codes go by 16 bytes from memory to
/// registers, several steps ahead; no thread waits for another until the sums are joined. A byte of codes (two inputs) is looked
/// up as a pair of T in a table of 256 x 32 words: each lane has its own bank. That is 1.5 instructions a weight (shift, mask and
/// load for two) against 2.4 of nf4.cuh's PRMT, which on A100 and H100 alone takes as long as the memory.
/// Weights are multiplied without their scale; the sum over a block of 64 inputs is scaled in f32. So the only
/// rounding is that of the table to T: relative error 0.9e-3 (bf16), 0.8e-4 (f16).
#include "compat.cuh"
#include "kernels.h"
#include "nf4.cuh"
#include "types.cuh"

constexpr uint32_t TABLE_BYTES = 256 * 32 * 4;
/// Floats between the sums of two rows of a warp's 32 outputs, so that lanes store them without meeting in a bank.
constexpr uint32_t SUM_STRIDE = 36;

/// Eight warps: ACROSS of them beside each other (32 outputs each), 8 / ACROSS of them share the inputs. 8 TILES rows. Codes are
/// read AHEAD blocks of 64 inputs ahead.
template <typename T, int TILES, int ACROSS, int AHEAD> struct Few {
    static constexpr uint32_t ALONG = 8 / ACROSS;
    static constexpr uint32_t SUM_BYTES = 8 * 8 * TILES * SUM_STRIDE * 4;
    static constexpr uint32_t MAP = SUM_BYTES > TABLE_BYTES ? SUM_BYTES : TABLE_BYTES; // sums take the table's place
    static constexpr uint32_t ALL = MAP + 1024;

    const Nf4Few &p;
    uint8_t *shared;
    uint32_t lane, warp, g, t;
    uint32_t group;      // of 32 outputs
    uint32_t begin, end; // of blocks of 64 inputs
    uint32_t chunk;      // this lane's first chunk of codes
    uint32_t row[TILES]; // element of `in`: row g of each tile, input 8t
    Nf4ScaleRow scales; // of output `lane`

    struct Block {
        U128 codes[2];
        Nf4RawScale scale;
    };
    struct Rows { // of 32 inputs
        U128 in[TILES];
    };

    DEVICE float *map() const { return reinterpret_cast<float *>(shared + MAP); }

    DEVICE void load(uint32_t kb, Block &block) const {
        if (kb >= end) return;
        const U128 *from = reinterpret_cast<const U128 *>(p.w.codes) + chunk + kb * 64;
        block.codes[0] = load_stream_16(from);
        block.codes[1] = load_stream_16(from + 32);
        block.scale = nf4_load_scale(p.w, scales, kb);
    }
    DEVICE void load(uint32_t kb, uint32_t half, Rows &rows) const {
        if (kb >= end) return;
        UNROLL
        for (uint32_t i = 0; i < TILES; i++) rows.in[i] = load_16(static_cast<const T *>(p.in) + row[i] + kb * 64 + half * 32);
    }

    /// The fragment of a word: byte i is a[i].
    DEVICE void look_up(uint32_t word, uint32_t (&a)[4]) const {
        // A byte is a row of 128 bytes: its place is the byte times 128, plus the lane's word.
        a[0] = entry(word << 7);
        a[1] = entry(word >> 1);
        a[2] = entry(word >> 9);
        a[3] = entry(word >> 17);
    }
    DEVICE uint32_t entry(uint32_t shifted) const {
        return *reinterpret_cast<const uint32_t *>(shared + lop3<0xEA>(shifted, 0x7F80, lane * 4));
    }

    /// part += 32 inputs; part[i][j]: rows 8j.., outputs 16 i.. (row g of a is output 4g + 2i, row g + 8 the next).
    DEVICE void multiply(const U128 &code, const Rows &rows, float (&part)[2][TILES][4]) const {
        uint32_t word[2][2] = {{code.x, code.y}, {code.z, code.w}};
        UNROLL
        for (int e = 0; e < 2; e++) {
            UNROLL
            for (int i = 0; i < 2; i++) {
                uint32_t a[4];
                look_up(word[e][i], a);
                UNROLL
                for (int j = 0; j < TILES; j++) {
                    const U128 &in = rows.in[j];
                    uint32_t b[2] = {e ? in.z : in.x, e ? in.w : in.y};
                    mma_16x8x16<T>(part[i][j], a, b);
                }
            }
        }
    }

    /// sum += scale * part
    DEVICE void add(float own, const float (&part)[2][TILES][4], float (&sum)[2][TILES][4]) const {
        UNROLL
        for (int i = 0; i < 2; i++) {
            UNROLL
            for (int odd = 0; odd < 2; odd++) {
                float scale = __shfl_sync(0xFFFFFFFFu, own, int(4 * g) + 2 * i + odd);
                UNROLL
                for (int j = 0; j < TILES; j++) {
                    sum[i][j][2 * odd] += scale * part[i][j][2 * odd];
                    sum[i][j][2 * odd + 1] += scale * part[i][j][2 * odd + 1];
                }
            }
        }
    }

    static DEVICE void clear(float (&sum)[2][TILES][4]) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            UNROLL
            for (int j = 0; j < TILES; j++) {
                UNROLL
                for (int k = 0; k < 4; k++) sum[i][j][k] = 0.0f;
            }
        }
    }

    /// Entry b of the table: codes b % 16 and b / 16, in every lane's bank. Thread b writes it.
    DEVICE void fill_table() const {
        uint32_t pair = pack2<T>(p.values[threadIdx.x % 16], p.values[threadIdx.x / 16]);
        UNROLL
        for (uint32_t i = 0; i < 8; i++)
            store_16(shared + threadIdx.x * 128 + (i + threadIdx.x) % 8 * 16, U128{pair, pair, pair, pair});
    }

    DEVICE void run() {
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32;
        g = lane / 4;
        t = lane % 4;
        group = blockIdx.x * ACROSS + warp % ACROSS;
        uint32_t blocks = p.w.inputs / 64, parts = p.splits * ALONG, part = blockIdx.y * ALONG + warp / ACROSS;
        begin = blocks * part / parts;
        end = group * 32 < p.w.outputs ? blocks * (part + 1) / parts : begin;
        chunk = keep(uint32_t(nf4_block_offset(p.w.first / 32 + group, 0, p.w.inputs) / 16) + nf4_slot(g, t));
        UNROLL
        for (uint32_t i = 0; i < TILES; i++) // rows that are not there repeat the last: their sums are not stored
            row[i] = keep(min(8 * i + g, p.m - 1) * p.w.inputs + 8 * t);
        scales = nf4_scale_row(p.w, group * 32 + lane);
        scales.index = keep(scales.index);
        scales.block = keep(scales.block);

        // Past the end blocks and rows keep what they had (zeros at first), and the scale is 0.
        Block ahead[AHEAD] = {};
        Rows rows[2] = {};
        UNROLL
        for (int i = 0; i < AHEAD; i++) load(begin + i, ahead[i]);
        load(begin, 0, rows[0]);
        fill_table(); // while the first codes are on their way
        nf4_load_map(p.w, map(), threadIdx.x, 256);
        __syncthreads();

        float sum[2][TILES][4];
        clear(sum);
        for (uint32_t kb = begin; kb < end; kb += AHEAD) {
            UNROLL
            for (uint32_t i = 0; i < AHEAD; i++) {
                float part[2][TILES][4];
                clear(part);
                load(kb + i, 1, rows[1]);
                multiply(ahead[i].codes[0], rows[0], part);
                load(kb + i + 1, 0, rows[0]);
                multiply(ahead[i].codes[1], rows[1], part);
                add(kb + i < end ? nf4_scale(p.w, ahead[i].scale, map()) : 0.0f, part, sum);
                load(kb + i + AHEAD, ahead[i]);
            }
        }
        __syncthreads(); // nobody needs the table any more
        float *sums = reinterpret_cast<float *>(shared);
        UNROLL
        for (int j = 0; j < TILES; j++) {
            UNROLL
            for (int odd = 0; odd < 2; odd++)
                store_16(sums + (warp * 8 * TILES + 8 * j + 2 * t + odd) * SUM_STRIDE + 4 * g,
                         U128{__float_as_uint(sum[0][j][odd]), __float_as_uint(sum[0][j][odd + 2]),
                              __float_as_uint(sum[1][j][odd]), __float_as_uint(sum[1][j][odd + 2])});
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < p.m * ACROSS * 32; i += 256) finish(i / (ACROSS * 32), i % (ACROSS * 32), sums);
    }

    /// Joins the warps' sums of a row and an output in their order, and writes the result.
    DEVICE void finish(uint32_t row, uint32_t output, const float *sums) const {
        uint32_t n = blockIdx.x * ACROSS * 32 + output;
        if (n >= p.w.outputs) return;
        float v = 0.0f;
        UNROLL
        for (uint32_t i = 0; i < ALONG; i++)
            v += sums[((i * ACROSS + output / 32) * 8 * TILES + row) * SUM_STRIDE + output % 32];
        v *= p.scale;
        if (p.u && blockIdx.y == 0) {
            float more = 0.0f;
            for (uint32_t r = 0; r < p.rank; r++)
                more += to_float(static_cast<const T *>(p.u)[row * p.rank + r]) * p.lora[uint64_t(n) * p.rank + r];
            v += p.lora_scale * more;
        }
        uint64_t at = uint64_t(row) * p.w.outputs + n;
        if (!p.out) {
            p.partial[uint64_t(blockIdx.y) * p.m * p.w.outputs + at] = v;
            return;
        }
        if (p.bias) v += p.bias[n];
        if (p.residual) v += p.alpha * to_float(static_cast<const T *>(p.residual)[at]);
        static_cast<T *>(p.out)[at] = from_float<T>(v);
    }
};

template <typename T, int TILES, int ACROSS, int AHEAD> DEVICE void nf4_few(const Nf4Few &p) {
    typedef Few<T, TILES, ACROSS, AHEAD> Kernel;
    static_assert(Kernel::ALL == (TILES == 4 ? GLM_NF4_FEW_SHARED_32 : GLM_NF4_FEW_SHARED), "kernels.h says what is asked for");
    SHARED_MEMORY(uint8_t, shared);
    Kernel{p, shared, 0, 0, 0, 0, 0, 0, 0, 0, {}, {}}.run();
}

/// Grid: [ceil(N / (32 * 1, 2, 4)), splits], 256 threads.
// static: nf4_few_* threads=256 shared=33792 expect=mma,load16
// static: nf4_few_32_* threads=256 shared=37888 expect=mma,load16
#define NF4_FEW(suffix, T)                                                                                   \
    KERNEL_MIN(nf4_few_8_##suffix, Nf4Few, 256, 2) { nf4_few<T, 1, 1, 4>(p); }                               \
    KERNEL_MIN(nf4_few_16_##suffix, Nf4Few, 256, 2) { nf4_few<T, 2, 2, 2>(p); }                              \
    KERNEL(nf4_few_32_##suffix, Nf4Few, 256) { nf4_few<T, 4, 4, 2>(p); }

NF4_FEW(f16, half_t)
#if GLM_HAS_BF16
NF4_FEW(bf16, bf16_t)
#endif
