/// Prefix-LM attention in f32, forward and backward, without tensor cores: any head_dim up to 128.
///
/// What runs in f32 is tests and small models: these kernels are the plain ones. A warp owns a few rows; a lane is one of the 32
/// columns of a tile while scores are computed, and every 32nd element of a head while they are summed up.
#include "attention.cuh"
#include "compat.cuh"
#include "kernels.h"
#include "reduce.cuh"

constexpr int WARPS = GLM_ATTENTION_THREADS / 32;
/// Keys or queries of a tile: one for each lane.
constexpr int TILE = GLM_ATTENTION_F32_TILE;
/// Elements of a head for each lane, at most.
constexpr int PARTS = GLM_ATTENTION_F32_HEAD_DIM / 32;

/// Copies `count` rows of `d` floats, `stride` apart, `valid` of which exist, to rows `pitch` apart; the others become 0.
DEVICE void copy_rows(float *to, uint32_t pitch, const float *from, uint64_t stride, int count, int valid, uint32_t d) {
    for (int row = int(threadIdx.x / 32); row < count; row += WARPS) {
        for (uint32_t c = threadIdx.x % 32; c < d; c += 32) to[row * pitch + c] = row < valid ? from[row * stride + c] : 0.0f;
    }
}

/// `sums[r][i] += Σ_j weights[r][j] rows[j][lane + 32 i]` over a tile.
template <int ROWS>
DEVICE void add_weighted(float (&sums)[ROWS][PARTS], const float *weights, const float *rows, uint32_t pitch, uint32_t d) {
    uint32_t lane = threadIdx.x % 32;
    for (int j = 0; j < TILE; j++) {
        UNROLL
        for (int i = 0; i < PARTS; i++) {
            uint32_t c = lane + 32 * i;
            float x = c < d ? rows[j * pitch + c] : 0.0f;
            UNROLL
            for (int r = 0; r < ROWS; r++) sums[r][i] += weights[r * TILE + j] * x;
        }
    }
}

/// `sums[r] = left[r] . right[lane]`: a warp's rows, `d` apart, with the tile's row of this lane, `pitch` apart.
template <int ROWS> DEVICE void dots(float (&sums)[ROWS], const float *left, const float *right, uint32_t pitch, uint32_t d) {
    UNROLL
    for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
    for (uint32_t c = 0; c < d; c++) {
        float x = right[threadIdx.x % 32 * pitch + c];
        UNROLL
        for (int r = 0; r < ROWS; r++) sums[r] += left[r * d + c] * x;
    }
}

/// The rows of a block: first of the prefix, then of the sequence, from tile `first_tile` of it.
struct KeyRows {
    int prefix_tiles, first_tile, count;

    DEVICE KeyRows(View seen, uint32_t prefix) {
        prefix_tiles = (int(prefix) + TILE - 1) / TILE;
        first_tile = seen.from / TILE - prefix_tiles;
        count = (seen.to + TILE - 1) / TILE - first_tile;
    }
    DEVICE int first(int i) const { return (i < prefix_tiles ? i : first_tile + i) * TILE; }
};

/// Blocks: (16 queries, head, sequence); 4 warps of 4 queries each. Shared memory: 32 keys (rows of d | 1 floats, so that the
/// lanes' rows lie in different banks), 32 values and 16 queries (rows of d), and 32 weights for each query.
// static: attention_forward_f32 threads=128 shared=43264
KERNEL_MIN(attention_forward_f32, AttentionForward, 128, 4) {
    constexpr int ROWS = GLM_ATTENTION_F32_QUERIES / WARPS;
    uint32_t d = p.head_dim, pitch = d | 1;
    SHARED_MEMORY(float, keys);
    float *values = keys + TILE * pitch, *block_q = values + TILE * d, *block_weights = block_q + WARPS * ROWS * d;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, sequence = blockIdx.z;
    float *q = block_q + warp * ROWS * d, *weights = block_weights + warp * ROWS * TILE;
    int offset = int(p.key_count) - int(p.queries);
    int first = int(blockIdx.x) * WARPS * ROWS, end = min(first + WARPS * ROWS, int(p.queries)), row = first + int(warp) * ROWS;
    uint64_t query = uint64_t(sequence) * p.queries + first;
    uint32_t hidden = p.heads * d;

    copy_rows(block_q, d, static_cast<const float *>(p.qkv) + query * 3 * hidden + head * 3 * d, 3 * hidden, WARPS * ROWS,
              end - first, d);
    Mask mask = Mask::load(p.spans, sequence, p.key_count, p.prefix);
    KeyRows tiles(mask.together(offset + first, offset + end, true), p.prefix);
    uint64_t key_at = sequence * p.key_batch_stride + uint64_t(head) * p.key_head_stride;
    float out[ROWS][PARTS] = {}, top[ROWS], total[ROWS];
    for (int r = 0; r < ROWS; r++) top[r] = -INFINITY, total[r] = 0.0f;

    for (int i = 0; i < tiles.count; i++) {
        bool in_prefix = i < tiles.prefix_tiles;
        int key = tiles.first(i), count = int(in_prefix ? p.prefix : p.key_count);
        uint64_t stride = in_prefix ? d : p.key_row_stride;
        uint64_t from = (in_prefix ? prefix_start(p, sequence, head, d) : key_at) + key * stride;
        __syncthreads();
        copy_rows(keys, pitch, static_cast<const float *>(in_prefix ? p.prefix_keys : p.keys) + from, stride, TILE, count - key, d);
        copy_rows(values, d, static_cast<const float *>(in_prefix ? p.prefix_values : p.values) + from, stride, TILE,
                  count - key, d);
        __syncthreads();
        float scores[ROWS];
        dots(scores, q, keys, pitch, d);
        for (int r = 0; r < ROWS; r++) {
            View seen = in_prefix ? View{0, count, false} : mask.of(offset + row + r);
            int at = key + int(lane);
            float score = seen.uniform ? 0.0f : scores[r] * p.scale;
            if (at < seen.from || at >= seen.to) score = -INFINITY;
            float highest = fmaxf(top[r], warp_max(score));
            float reference = highest == -INFINITY ? 0.0f : highest;
            float weight = exp2f(score - reference), shrink = exp2f(top[r] - reference);
            top[r] = highest;
            total[r] = total[r] * shrink + warp_sum(weight);
            for (int part = 0; part < PARTS; part++) out[r][part] *= shrink;
            weights[r * TILE + lane] = weight;
        }
        __syncwarp();
        add_weighted(out, weights, values, d, d);
        __syncwarp();
    }
    for (int r = 0; r < ROWS && row + r < end; r++) {
        float *context = static_cast<float *>(p.context) + (query + warp * ROWS + r) * hidden + head * d;
        float inverse = 1.0f / total[r];
        for (int part = 0; part < PARTS; part++) {
            if (lane + 32 * part < d) context[lane + 32 * part] = out[r][part] * inverse;
        }
        bool uniform = mask.of(offset + row + r).uniform;
        if (lane == 0) {
            p.log_sum_exp[(uint64_t(sequence) * p.heads + head) * p.queries + row + r] =
                uniform ? 0.0f : (top[r] + log2f(total[r])) * LN_2;
        }
    }
}

/// Rows of a warp in the two kernels below: 8 for each block keep them under 48 KB of shared memory.
constexpr int FEW = GLM_ATTENTION_BACKWARD_F32_ROWS / WARPS;

/// Blocks: (8 queries, head, sequence); 4 warps of 2 queries each. Shared memory: 32 keys and values (rows of d | 1), 8 queries
/// and their dO (rows of d), 32 dS for each query.
// static: attention_backward_q_f32 threads=128 shared=42240
KERNEL_MIN(attention_backward_q_f32, AttentionBackward, 128, 4) {
    uint32_t d = p.head_dim, pitch = d | 1;
    SHARED_MEMORY(float, keys);
    float *values = keys + TILE * pitch, *block_q = values + TILE * pitch, *block_d_out = block_q + WARPS * FEW * d;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, sequence = blockIdx.z;
    float *q = block_q + warp * FEW * d, *d_out = block_d_out + warp * FEW * d;
    float *slopes = block_d_out + WARPS * FEW * d + warp * FEW * TILE;
    int first = int(blockIdx.x) * WARPS * FEW, end = min(first + WARPS * FEW, int(p.queries)), row = first + int(warp) * FEW;
    uint64_t sequence_row = uint64_t(sequence) * p.queries;
    uint32_t hidden = p.heads * d, wide = 3 * hidden;
    const float *qkv = static_cast<const float *>(p.qkv) + sequence_row * wide + head * 3 * d;
    const float *d_context = static_cast<const float *>(p.d_context) + (sequence_row + first) * hidden + head * d;

    copy_rows(block_q, d, qkv + uint64_t(first) * wide, wide, WARPS * FEW, end - first, d);
    copy_rows(block_d_out, d, d_context, hidden, WARPS * FEW, end - first, d);
    Mask mask = Mask::load(p.spans, sequence, p.queries, p.prefix);
    KeyRows tiles(mask.together(first, end, false), p.prefix);
    float dq[FEW][PARTS] = {};

    for (int i = 0; i < tiles.count; i++) {
        bool in_prefix = i < tiles.prefix_tiles;
        int key = tiles.first(i), count = int(in_prefix ? p.prefix : p.queries);
        uint64_t stride = in_prefix ? d : wide, prefix_at = prefix_start(p, sequence, head, d) + uint64_t(key) * d;
        const float *from = in_prefix ? static_cast<const float *>(p.prefix_keys) + prefix_at : qkv + key * stride + d;
        const float *value = in_prefix ? static_cast<const float *>(p.prefix_values) + prefix_at : from + d;
        __syncthreads();
        copy_rows(keys, pitch, from, stride, TILE, count - key, d);
        copy_rows(values, pitch, value, stride, TILE, count - key, d);
        __syncthreads();
        float scores[FEW], gradients[FEW];
        dots(scores, q, keys, pitch, d);
        dots(gradients, d_out, values, pitch, d);
        for (int r = 0; r < FEW; r++) {
            View seen = in_prefix ? View{0, count, false} : mask.of(row + r);
            int at = key + int(lane);
            uint64_t statistic = (uint64_t(sequence) * p.heads + head) * p.queries + min(row + r, end - 1);
            bool gives = at >= seen.from && at < seen.to && !seen.uniform && row + r < end;
            float weight = exp2f(scores[r] * p.scale - p.log_sum_exp[statistic] * LOG2_E);
            slopes[r * TILE + lane] = gives ? weight * (gradients[r] - p.delta[statistic]) : 0.0f;
        }
        __syncwarp();
        add_weighted(dq, slopes, keys, pitch, d);
        __syncwarp();
    }
    float *to = static_cast<float *>(p.dqkv) + (sequence_row + row) * wide + head * 3 * d;
    for (int r = 0; r < FEW && row + r < end; r++) {
        for (int part = 0; part < PARTS; part++) {
            uint32_t c = lane + 32 * part;
            if (c < d) to[uint64_t(r) * wide + c] = dq[r][part] * p.scale * LN_2;
        }
    }
}

/// Blocks: (8 keys, head, sequence), or (8 keys of a prefix, head, prefix); 4 warps of 2 keys each. Shared memory: 32 queries and
/// their dO (rows of d | 1), 8 keys and values (rows of d), 32 weights and dS for each key.
template <bool PREFIX> DEVICE void attention_backward_kv_plain(const AttentionBackward &p) {
    uint32_t d = p.head_dim, pitch = d | 1;
    SHARED_MEMORY(float, q);
    float *d_out = q + TILE * pitch, *block_k = d_out + TILE * pitch, *block_v = block_k + WARPS * FEW * d;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y;
    float *k = block_k + warp * FEW * d, *v = block_v + warp * FEW * d;
    float *weights = block_v + WARPS * FEW * d + warp * 2 * FEW * TILE, *slopes = weights + FEW * TILE;
    int count = int(PREFIX ? p.prefix : p.queries);
    int first = int(blockIdx.x) * WARPS * FEW, end = min(first + WARPS * FEW, count), row = first + int(warp) * FEW;
    uint32_t hidden = p.heads * d, wide = 3 * hidden;
    uint64_t sequence_row = uint64_t(blockIdx.z) * p.queries;

    uint64_t stride = PREFIX ? d : wide, prefix_at = prefix_start(p, blockIdx.z, head, d) + uint64_t(first) * d;
    const float *own = static_cast<const float *>(p.qkv) + (sequence_row + first) * wide + (head * 3 + 1) * d;
    const float *from = PREFIX ? static_cast<const float *>(p.prefix_keys) + prefix_at : own;
    const float *value = PREFIX ? static_cast<const float *>(p.prefix_values) + prefix_at : own + d;
    copy_rows(block_k, d, from, stride, WARPS * FEW, end - first, d);
    copy_rows(block_v, d, value, stride, WARPS * FEW, end - first, d);
    // To a prefix that they share all sequences are one.
    int rows = int(PREFIX && p.prefix_batch_stride == 0 ? p.size * p.queries : p.queries);
    Mask mask = Mask::load(p.spans, blockIdx.z, p.queries, p.prefix);
    QueryTiles tiles{0, 0, (rows + TILE - 1) / TILE};
    if (!PREFIX) tiles = QueryTiles::of(mask, first, end, TILE);
    float dk[FEW][PARTS] = {}, dv[FEW][PARTS] = {};

    for (int i = tiles.begin(); i < tiles.end; i = tiles.next(i)) {
        int query = i * TILE, at = query + int(lane);
        uint64_t query_row = sequence_row + query;
        __syncthreads();
        copy_rows(q, pitch, static_cast<const float *>(p.qkv) + query_row * wide + head * 3 * d, wide, TILE, rows - query, d);
        copy_rows(d_out, pitch, static_cast<const float *>(p.d_context) + query_row * hidden + head * d, hidden, TILE,
                  rows - query, d);
        __syncthreads();
        float scores[FEW], gradients[FEW];
        dots(scores, k, q, pitch, d);
        dots(gradients, v, d_out, pitch, d);
        uint64_t row_at = sequence_row + min(at, rows - 1);
        uint64_t statistic = (row_at / p.queries * p.heads + head) * p.queries + row_at % p.queries;
        float log_sum_exp = p.log_sum_exp[statistic] * LOG2_E, delta = p.delta[statistic];
        View seen = PREFIX ? View{0, count, false} : mask.of(at);
        for (int r = 0; r < FEW; r++) {
            bool visible = at < rows && row + r >= seen.from && row + r < seen.to;
            float weight = seen.uniform ? 1.0f / float(p.queries) : exp2f(scores[r] * p.scale - log_sum_exp);
            weights[r * TILE + lane] = visible ? weight : 0.0f;
            slopes[r * TILE + lane] = visible && !seen.uniform ? weight * (gradients[r] - delta) : 0.0f;
        }
        __syncwarp();
        add_weighted(dv, weights, d_out, pitch, d);
        add_weighted(dk, slopes, q, pitch, d);
        __syncwarp();
    }
    for (int r = 0; r < FEW && row + r < end; r++) {
        for (int part = 0; part < PARTS; part++) {
            uint32_t c = lane + 32 * part;
            if (c >= d) continue;
            float key_gradient = dk[r][part] * p.scale * LN_2;
            if constexpr (PREFIX) {
                uint64_t to = prefix_start(p, blockIdx.z, head, d) + uint64_t(row + r) * d + c;
                p.d_prefix_keys[to] += key_gradient;
                p.d_prefix_values[to] += dv[r][part];
            } else {
                float *to = static_cast<float *>(p.dqkv) + (sequence_row + row + r) * wide + (head * 3 + 1) * d + c;
                to[0] = key_gradient;
                to[d] = dv[r][part];
            }
        }
    }
}

// static: attention_backward_kv_f32 threads=128 shared=43264
// static: attention_backward_prefix_f32 threads=128 shared=43264
KERNEL_MIN(attention_backward_kv_f32, AttentionBackward, 128, 4) { attention_backward_kv_plain<false>(p); }
KERNEL_MIN(attention_backward_prefix_f32, AttentionBackward, 128, 4) { attention_backward_kv_plain<true>(p); }
