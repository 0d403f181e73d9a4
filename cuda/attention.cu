/// Prefix-LM attention, forward, on the tensor cores (Dao 2023, FlashAttention-2): scores never leave the chip.
///
/// Also the prefill of a cache, whose keys lie elsewhere and whose queries begin later; `AttentionForward` says where.
#include "attention.cuh"
#include "compat.cuh"
#include "kernels.h"
#include "types.cuh"

/// The keys of one block's way: tiles of the prefix, then those of the sequence that one of the block's queries sees.
///
/// Pointers are put together anew for each tile: they would take registers that the accumulators need.
template <typename T, int D, int KEYS> struct KeyTiles {
    int prefix_tiles, first_tile, count;

    DEVICE KeyTiles(const AttentionForward &p, View seen) {
        prefix_tiles = (int(p.prefix) + KEYS - 1) / KEYS;
        first_tile = seen.from / KEYS - prefix_tiles;
        count = (seen.to + KEYS - 1) / KEYS - first_tile;
    }

    /// First key of tile i, in the prefix or in the sequence.
    DEVICE int first(int i) const { return (i < prefix_tiles ? i : first_tile + i) * KEYS; }

    DEVICE void load(T *tile, const AttentionForward &p, int i, bool value) const {
        if (i >= count) return;
        bool in_prefix = i < prefix_tiles;
        int at = first(i);
        uint32_t stride = in_prefix ? D : p.key_row_stride;
        const T *rows = static_cast<const T *>(in_prefix ? (value ? p.prefix_values : p.prefix_keys)
                                                         : (value ? p.values : p.keys));
        rows += in_prefix ? prefix_start(p, blockIdx.z, blockIdx.y, D)
                          : blockIdx.z * p.key_batch_stride + uint64_t(blockIdx.y) * p.key_head_stride;
        load_tile<D, KEYS>(tile, rows + uint64_t(at) * stride, stride, int(in_prefix ? p.prefix : p.key_count) - at);
    }
};

/// One step of the online softmax over a tile's scores of 16 rows: scores become p, `out` is rescaled.
///
/// `top` is the largest score so far, unscaled; `total` this lane's part of the sum of p.
template <int PIECES, int OUT>
DEVICE void softmax_step(float (&scores)[PIECES][4], float (&out)[OUT][4], float (&top)[2], float (&total)[2], float scale) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        float highest = top[half];
        UNROLL
        for (int n = 0; n < PIECES; n++) highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        highest = quad_max(highest);
        // Nothing seen yet: any finite reference gives p = 0.
        float reference = highest == -INFINITY ? 0.0f : highest * scale;
        float shrink = exp2_approx(top[half] * scale - reference);
        top[half] = highest;
        float sum = 0.0f;
        UNROLL
        for (int n = 0; n < PIECES; n++) {
            UNROLL
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                scores[n][i] = exp2_approx(scores[n][i] * scale - reference);
                sum += scores[n][i];
            }
        }
        total[half] = total[half] * shrink + sum;
        UNROLL
        for (int n = 0; n < OUT; n++) {
            out[n][2 * half] *= shrink;
            out[n][2 * half + 1] *= shrink;
        }
    }
}

/// Blocks: (tile of 64 TALL queries, head, sequence), those with the most keys first; 4 warps of 16 TALL queries each.
///
/// Shared memory: a tile of KEYS keys (two if TALL > 1), one of values, each D wide, and the queries: beside them if
/// TALL > 1, else in the values' place until they are in registers. While scores are computed the values arrive, and the next
/// keys then or while p v is computed. Heads and sequences <= 65535.
template <typename T, int D, int TALL, int KEYS> DEVICE void attention_forward(const AttentionForward &p) {
    constexpr int STEPS = D / 16, ROWS = 64 * TALL, STAGES = TALL > 1 ? 2 : 1;
    static_assert(ROWS == (TALL > 1 ? GLM_ATTENTION_TALL_QUERIES : GLM_ATTENTION_QUERIES), "the host knows");
    static_assert(2 * ((STAGES + 1) * KEYS + (TALL > 1 ? ROWS : 0)) ==
                      (TALL > 1 ? GLM_ATTENTION_TALL_SHARED_BYTES : GLM_ATTENTION_SHARED_BYTES), "the host knows");
    SHARED_MEMORY(T, key_tiles);
    T *value_tile = key_tiles + STAGES * KEYS * D;
    T *query_tile = TALL > 1 ? value_tile + KEYS * D : value_tile;

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    uint32_t head = blockIdx.y, sequence = blockIdx.z;
    int queries = int(p.queries), offset = int(p.key_count) - queries;
    int first = int(gridDim.x - 1 - blockIdx.x) * ROWS;
    int end = min(first + ROWS, queries);
    int warp_row = warp * 16 * TALL;
    uint32_t hidden = p.heads * D;

    Mask mask = Mask::load(p.spans, sequence, p.key_count, p.prefix);
    View each = mask.each(offset + first);
    KeyTiles<T, D, KEYS> tiles(p, mask.together(offset + first, offset + end, true));

    const T *q = static_cast<const T *>(p.qkv) + (uint64_t(sequence) * queries + first) * (3 * hidden) + head * (3 * D);
    load_tile<D, ROWS>(query_tile, q, 3 * hidden, end - first);
    tiles.load(key_tiles, p, 0, false);
    cp_async_commit();

    uint32_t a[TALL > 1 ? 1 : STEPS][4];
    if (TALL == 1) {
        cp_async_wait<0>();
        __syncthreads();
        UNROLL
        for (int step = 0; step < STEPS; step++) load_a<D>(a[TALL > 1 ? 0 : step], query_tile, warp_row, step);
    }

    float out[TALL][D / 8][4], top[TALL][2], total[TALL][2];
    UNROLL
    for (int m = 0; m < TALL; m++) {
        UNROLL
        for (int n = 0; n < D / 8; n++) out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0.0f;
        UNROLL
        for (int half = 0; half < 2; half++) {
            top[m][half] = -INFINITY;
            total[m][half] = 0.0f;
        }
    }

    int stage = 0;
    for (int i = 0; i < tiles.count; i++) {
        cp_async_wait<0>();
        __syncthreads(); // these keys are there, and nobody reads the last values any more
        tiles.load(value_tile, p, i, true);
        cp_async_commit();
        const T *key_tile = key_tiles + stage;
        if (STAGES > 1) {
            stage = KEYS * D - stage;
            tiles.load(key_tiles + stage, p, i + 1, false);
            cp_async_commit();
        }

        float scores[TALL][KEYS / 8][4];
        UNROLL
        for (int m = 0; m < TALL; m++) {
            UNROLL
            for (int n = 0; n < KEYS / 8; n++) scores[m][n][0] = scores[m][n][1] = scores[m][n][2] = scores[m][n][3] = 0.0f;
        }
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            uint32_t rows[TALL][4];
            UNROLL
            for (int m = 0; m < TALL; m++) {
                if (TALL > 1) {
                    load_a<D>(rows[m], query_tile, warp_row + 16 * m, step);
                } else {
                    UNROLL
                    for (int r = 0; r < 4; r++) rows[m][r] = a[TALL > 1 ? 0 : step][r];
                }
            }
            UNROLL
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, key_tile, 16 * n, step);
                UNROLL
                for (int m = 0; m < TALL; m++) mma_pair<T>(scores[m][2 * n], scores[m][2 * n + 1], rows[m], b);
            }
        }

        int key = tiles.first(i);
        bool in_prefix = i < tiles.prefix_tiles;
        bool whole = in_prefix ? key + KEYS <= int(p.prefix) : key >= each.from && key + KEYS <= each.to;
        if (!whole) {
            Mask again = Mask::load(p.spans, sequence, p.key_count, p.prefix); // not kept: registers
            UNROLL
            for (int m = 0; m < TALL; m++) {
                UNROLL
                for (int half = 0; half < 2; half++) {
                    int position = offset + first + warp_row + 16 * m + 8 * half + g;
                    View seen = in_prefix ? View{0, int(p.prefix), false} : again.of(position);
                    UNROLL
                    for (int n = 0; n < KEYS / 8; n++) {
                        UNROLL
                        for (int j = 0; j < 2; j++) {
                            int at = key + 8 * n + 2 * t + j;
                            float &score = scores[m][n][2 * half + j];
                            score = at < seen.from || at >= seen.to ? -INFINITY : seen.uniform ? 0.0f : score;
                        }
                    }
                }
            }
        }

        if (STAGES == 1) {
            cp_async_wait<0>();
            __syncthreads(); // the values are there, and nobody reads these keys any more
            tiles.load(key_tiles, p, i + 1, false);
            cp_async_commit();
        }
        UNROLL
        for (int m = 0; m < TALL; m++) softmax_step(scores[m], out[m], top[m], total[m], p.scale);
        if (STAGES > 1) {
            cp_async_wait<1>();
            __syncthreads(); // the values are there
        }
        UNROLL
        for (int step = 0; step < KEYS / 16; step++) {
            uint32_t weights[TALL][4];
            UNROLL
            for (int m = 0; m < TALL; m++) pack_a<T>(weights[m], scores[m][2 * step], scores[m][2 * step + 1]);
            UNROLL
            for (int n = 0; n < STEPS; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, value_tile, 16 * step, n);
                UNROLL
                for (int m = 0; m < TALL; m++) mma_pair<T>(out[m][2 * n], out[m][2 * n + 1], weights[m], b);
            }
        }
    }
    cp_async_wait<0>();
    if (TALL == 1) __syncthreads(); // the queries' place is the values'

    T *context = static_cast<T *>(p.context) + (uint64_t(sequence) * queries + first) * hidden + head * D;
    Mask again = Mask::load(p.spans, sequence, p.key_count, p.prefix);
    float *log_sum_exp = p.log_sum_exp + (uint64_t(sequence) * p.heads + head) * queries + first;
    UNROLL
    for (int m = 0; m < TALL; m++) {
        float inverse[2];
        UNROLL
        for (int half = 0; half < 2; half++) {
            float sum = quad_sum(total[m][half]);
            inverse[half] = 1.0f / sum;
            int row = warp_row + 16 * m + 8 * half + g;
            if (t == 0 && first + row < end) {
                bool uniform = again.of(offset + first + row).uniform;
                log_sum_exp[row] = uniform ? 0.0f : (top[m][half] * p.scale + log2f(sum)) * LN_2;
            }
        }
        store_accumulators<D>(query_tile, warp_row + 16 * m, out[m], inverse[0], inverse[1]);
        __syncwarp();
        store_rows<D>(context, hidden, query_tile, warp_row + 16 * m, end - first);
    }
}

// Three blocks on a multiprocessor with 100 KB of shared memory and more; Turing's 64 KB hold two.
#ifdef GLM_SM75
#define ATTENTION_BLOCKS 2
#else
#define ATTENTION_BLOCKS 3
#endif

// static: attention_forward_d16 threads=128 shared=4096 expect=mma,load16
// static: attention_forward_d32 threads=128 shared=8192 expect=mma,load16
// static: attention_forward_d64 threads=128 shared=16384 expect=mma,load16
// static: attention_forward_d128 threads=128 shared=32768 expect=mma,load16
#define ATTENTION_FORWARD(suffix, T)                                                                         \
    KERNEL_MIN(attention_forward_d16##suffix, AttentionForward, 128, 3) { attention_forward<T, 16, 1, 64>(p); } \
    KERNEL_MIN(attention_forward_d32##suffix, AttentionForward, 128, 3) { attention_forward<T, 32, 1, 64>(p); } \
    KERNEL_MIN(attention_forward_d64##suffix, AttentionForward, 128, 3) { attention_forward<T, 64, 1, 64>(p); } \
    KERNEL_MIN(attention_forward_d128##suffix, AttentionForward, 128, ATTENTION_BLOCKS) {                    \
        attention_forward<T, 128, 1, 64>(p);                                                                 \
    }

// A product of the tall kernel takes half as many loads of keys and values from shared memory, which is what bounds the other
// one where tensor cores are fast for it (A100, H100: a tile's loads take as many clocks as its products). Two of its blocks
// need 136 KB, so it is for those only. 48 keys: with 64, ptxas spills.
// cold: attention_forward_tall_d128 is not launched on sm_120, the one target for which ptxas 12.9 spills (4 bytes)
// static: attention_forward_tall_d128 threads=128 shared=69632 expect=mma,load16
#define ATTENTION_FORWARD_TALL(suffix, T)                                                                    \
    KERNEL(attention_forward_tall_d128##suffix, AttentionForward, 128) { attention_forward<T, 128, 2, 48>(p); }

ATTENTION_FORWARD(_f16, half_t)
#if GLM_HAS_BF16
ATTENTION_FORWARD(_bf16, bf16_t)
ATTENTION_FORWARD_TALL(_f16, half_t)
ATTENTION_FORWARD_TALL(_bf16, bf16_t)
#endif
