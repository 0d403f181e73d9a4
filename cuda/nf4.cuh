/// The device layout of 4-bit weights, and how codes and scales become numbers.
///
/// ONE LAYOUT FOR BOTH DIRECTIONS. W [N, K] is cut into groups of 32 outputs, a group into blocks of 32 outputs x 32 inputs
/// (512 bytes, blocks of a group follow each other along K), a block into 8 x 8 patches of 4 outputs x 4 inputs, a patch into
/// two words of 2 outputs x 4 inputs:
///
///     inputs   i0  i1  i2  i3
///     out o0    0   4  16  20      word 0: the number is the lowest bit of the code.
///     out o1    8  12  24  28      Every 16 bits hold 2 outputs x 2 inputs: pairs along inputs (what the forward product
///     out o2    0   4  16  20      wants in a register) and pairs along outputs (the backward product) lie in the same four
///     out o3    8  12  24  28      nibbles, so both directions decode with the same number of instructions.
///
/// Forward, the lane l of a warp with g = l / 4, t = l % 4 reads one chunk of 16 bytes, the patches (g, 2t) and (g, 2t + 1):
/// outputs 4g.. 4g+3, inputs 8t.. 8t+7. Of m16n8k16, column g of tile j is output 4g + j; in step e, k = 2t, 2t+1, 2t+8, 2t+9 are
/// inputs 8t + 4e + 0, 1, 2, 3. Backward it reads the patches (2t, g) and (2t + 1, g): outputs 8t.. 8t+7, inputs 4g.. 4g+3.
/// Column g of tile j is input 4g + j; in step e, k = 2t, 2t+1, 2t+8, 2t+9 are outputs 8t + 4e + 0, 1, 2, 3. Either way
/// * the other operand's fragments for 2 steps are 16 bytes of one row of it, columns 8t.. 8t+7: a plain load, no ldmatrix;
/// * a lane's accumulators of the 4 tiles are columns 8t.. 8t+7 of a row: 16 bytes to store;
/// and the words go from memory to the registers of mma without a detour.
///
/// Chunks within a block are permuted (nf4_slot) so that in shared memory neither the 16-byte reads forward nor the
/// 8-byte reads backward meet in a bank.
///
/// NUMBERS. Codes are renumbered when packed: p and p + 8 stand for values that, in T, agree in the top bit of both bytes
/// (nf4_decode_patch says why). `absmax` (flat f32, or 8-bit codes) are stored [group, K / 256, 32 outputs, 4 blocks of 64].
#ifndef GLM_NF4_CUH
#define GLM_NF4_CUH

#include "compat.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "types.cuh"

/// Bytes of a block of 32 x 32 codes.
constexpr uint32_t NF4_BLOCK_BYTES = 512;

struct alignas(8) U64 {
    uint32_t x, y;
};

/// Place, in units of 16 bytes, of the chunk of outputs 4 og.., inputs 8 c.. in its block. Of the three low bits, any two rows og =
/// 2i, 2i + 1 take all values (forward: eight lanes read those), and so do the even (odd) rows with c / 2 fixed (backward).
DEVICE uint32_t nf4_slot(uint32_t og, uint32_t c) {
    return og / 2 * 8 + (c % 2 * 4 + ((og ^ og >> 2) & 1) * 2 + ((c >> 1 ^ og >> 1) & 1));
}

/// Byte offset of the block of outputs 32 group.. and inputs 32 block...
DEVICE uint64_t nf4_block_offset(uint32_t group, uint32_t block, uint32_t inputs) {
    return (uint64_t(group) * (inputs / 32) + block) * NF4_BLOCK_BYTES;
}

/// Index of the scale of output n, inputs 64 kb...
DEVICE uint32_t nf4_scale_index(uint32_t n, uint32_t kb, uint32_t inputs) {
    return ((n / 32 * ((inputs + 255) / 256) + kb / 4) * 32 + n % 32) * 4 + kb % 4;
}

/// A scale as it lies in memory: read early, made a number when it is needed.
struct Nf4RawScale {
    uint32_t code;
    float value;
};

/// Where the scales of one output lie: the index of its first in the packed order, the number of its first block.
struct Nf4ScaleRow {
    uint32_t index, block;
};

/// Of output n of those used; of the last one when there is no such output: it will meet zeros, or sums that nobody stores.
DEVICE Nf4ScaleRow nf4_scale_row(const Nf4Weight &w, uint32_t n) {
    n = w.first + min(n, w.outputs - 1);
    return Nf4ScaleRow{nf4_scale_index(n, 0, w.inputs), n * (w.inputs / 64)};
}

/// The scale of inputs 64 kb.. (which there are).
DEVICE Nf4RawScale nf4_load_scale(const Nf4Weight &w, Nf4ScaleRow row, uint32_t kb) {
    uint32_t i = row.index + (kb / 4 * 128 + kb % 4);
    if (!w.absmax_codes) return Nf4RawScale{0, __ldg(w.absmax + i)};
    return Nf4RawScale{__ldg(w.absmax_codes + i), __ldg(w.absmax + (row.block + kb) / 256)};
}

/// The scale in f32. `map` is nf4_load_map's.
DEVICE float nf4_scale(const Nf4Weight &w, Nf4RawScale raw, const float *map) {
    if (!w.absmax_codes) return raw.value;
    // Two roundings, as everywhere else.
    return __fadd_rn(__fmul_rn(map[raw.code], raw.value), w.offset);
}

/// Copies the 256 meanings of 8-bit scales to shared memory; a barrier must follow. Does nothing for flat scales.
DEVICE void nf4_load_map(const Nf4Weight &w, float *map, uint32_t thread, uint32_t threads) {
    if (!w.absmax_codes) return;
    for (uint32_t i = thread; i < 256; i += threads) map[i] = w.map[i];
}

/// The code of output o, input i (both of 0..3) of a patch.
DEVICE uint32_t nf4_nibble(uint32_t word0, uint32_t word1, uint32_t o, uint32_t i) {
    return ((o < 2 ? word0 : word1) >> (i / 2 * 16 + o % 2 * 8 + i % 2 * 4)) & 15;
}

/// The planes in registers: the compiler must not read them from the constant bank again and again.
struct Nf4Tables {
    uint32_t low[4], high[4];
};

/// Both planes of four codes (the low 16 bits of `codes`; `flipped` is `codes` ^ 0x8888): byte i of `low` and `high`.
///
/// PRMT looks up 8 bytes, and where the selector's top bit is set gives the byte's sign instead. So the look-up of the lower
/// half of the table yields its entry for numbers below 8 and else the sign of the entry 8 lower, 00 or FF; the look-up of the upper
/// half, with top bits flipped, the other way round. XOR joins the two: numbers p and p + 8 that agree in their top bit can
/// undo each other's FF in the tables, and no mask and no selection is needed.
DEVICE void nf4_decode_4(uint32_t codes, uint32_t flipped, const Nf4Tables &tables, uint32_t &low, uint32_t &high) {
    low = prmt(tables.low[0], tables.low[1], codes) ^ prmt(tables.low[2], tables.low[3], flipped);
    high = prmt(tables.high[0], tables.high[1], codes) ^ prmt(tables.high[2], tables.high[3], flipped);
}

/// A patch in 16-bit pairs. TRANSPOSED false: pair[j][b] is output j, inputs 2b and 2b + 1; true: input j, outputs 2b and 2b + 1.
/// 19 instructions for 8 weights: 12 PRMT, 5 LOP3, 2 shifts.
template <bool TRANSPOSED>
DEVICE void nf4_decode_patch(uint32_t word0, uint32_t word1, const Nf4Tables &tables, uint32_t (&pair)[4][2]) {
    uint32_t word[2] = {word0, word1};
    UNROLL
    for (int outputs = 0; outputs < 2; outputs++) {
        uint32_t flipped = word[outputs] ^ 0x88888888u;
        UNROLL
        for (int inputs = 0; inputs < 2; inputs++) {
            uint32_t low, high;
            nf4_decode_4(word[outputs] >> 16 * inputs, flipped >> 16 * inputs, tables, low, high);
            if (TRANSPOSED) {
                pair[2 * inputs][outputs] = prmt(low, high, 0x6240);
                pair[2 * inputs + 1][outputs] = prmt(low, high, 0x7351);
            } else {
                pair[2 * outputs][inputs] = prmt(low, high, 0x5140);
                pair[2 * outputs + 1][inputs] = prmt(low, high, 0x7362);
            }
        }
    }
}

#endif
