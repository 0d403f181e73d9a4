/// The gradient of prefix-LM attention on the tensor cores, without atomic additions: the same inputs give the same bits.
///
/// P is computed anew from `log_sum_exp`; `dV = Pᵀ dO`, `dS = P * (dO Vᵀ - delta)`, `dQ = dS K / sqrt(d)`,
/// `dK = dSᵀ Q / sqrt(d)` (Dao et al. 2022, appendix B). dK and dV are sums over queries, dQ one over keys: a kernel for
/// each computes S and dP for itself, 7 products where 5 would do if dQ were added up across blocks.
#include "attention.cuh"
#include "compat.cuh"
#include "kernels.h"
#include "reduce.cuh"
#include "types.cuh"

/// One warp for each head of a row; 8 to a block.
template <typename T> DEVICE void attention_delta(const AttentionDelta &p) {
    uint64_t item = uint64_t(blockIdx.x) * GLM_ATTENTION_DELTA_HEADS + threadIdx.x / 32;
    if (item >= uint64_t(p.rows) * p.heads) return;
    uint32_t lane = threadIdx.x % 32;
    const T *d_context = static_cast<const T *>(p.d_context) + item * p.head_dim;
    const T *context = static_cast<const T *>(p.context) + item * p.head_dim;
    float sum = 0.0f;
    if constexpr (sizeof(T) == 2) {
        const uint32_t *left = reinterpret_cast<const uint32_t *>(d_context);
        const uint32_t *right = reinterpret_cast<const uint32_t *>(context);
        for (uint32_t c = lane; c < p.head_dim / 2; c += 32) {
            Float2 a = unpack2<T>(left[c]), b = unpack2<T>(right[c]);
            sum += a.x * b.x + a.y * b.y;
        }
    } else {
        for (uint32_t c = lane; c < p.head_dim; c += 32) sum += to_float(d_context[c]) * to_float(context[c]);
    }
    sum = warp_sum(sum);
    uint64_t row = item / p.heads;
    if (lane == 0) p.delta[(row / p.queries * p.heads + item % p.heads) * p.queries + row % p.queries] = sum;
}

// static: attention_delta threads=256
KERNELS_FOR_TYPES(attention_delta, AttentionDelta, 256)

/// Blocks: (tile of 64 queries, head, sequence), those with the most keys first; 4 warps of 16 queries each.
///
/// q and dO stay in registers. Shared memory: two stages of 32 keys and their values, D wide; the next stage arrives while
/// one is worked on. The first two take q and dO to the registers.
template <typename T, int D> DEVICE void attention_backward_q(const AttentionBackward &p) {
    constexpr int STEPS = D / 16, ROWS = GLM_ATTENTION_BACKWARD_ROWS, KEYS = 32, STAGE = 2 * KEYS * D;
    static_assert(2 * 2 * STAGE == GLM_ATTENTION_BACKWARD_Q_SHARED_BYTES * D, "the host knows");
    SHARED_MEMORY(T, shared);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    uint32_t head = blockIdx.y, sequence = blockIdx.z;
    int first = int(gridDim.x - 1 - blockIdx.x) * ROWS, end = min(first + ROWS, int(p.queries));
    uint32_t hidden = p.heads * D, wide = 3 * hidden;
    uint64_t row = uint64_t(sequence) * p.queries;
    const T *qkv = static_cast<const T *>(p.qkv) + row * wide + head * (3 * D);

    uint32_t q[STEPS][4], d_out[STEPS][4];
    {
        const T *d_context = static_cast<const T *>(p.d_context) + (row + first) * hidden + head * D;
        load_tile<D, ROWS>(shared, qkv + uint64_t(first) * wide, wide, end - first);
        load_tile<D, ROWS>(shared + STAGE, d_context, hidden, end - first);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            load_a<D>(q[step], shared, warp * 16, step);
            load_a<D>(d_out[step], shared + STAGE, warp * 16, step);
        }
        __syncthreads();
    }

    Mask mask = Mask::load(p.spans, sequence, p.queries, p.prefix);
    View together = mask.together(first, end, false), each = mask.each(first);
    int prefix_tiles = (int(p.prefix) + KEYS - 1) / KEYS;
    int first_tile = together.from / KEYS - prefix_tiles;
    int count = (together.to + KEYS - 1) / KEYS - first_tile;
    auto load = [&](int i) {
        if (i < count) {
            bool in_prefix = i < prefix_tiles;
            int key = (in_prefix ? i : first_tile + i) * KEYS;
            uint32_t stride = in_prefix ? D : wide;
            uint64_t prefix_at = prefix_start(p, sequence, head, D) + uint64_t(key) * D;
            const T *keys = in_prefix ? static_cast<const T *>(p.prefix_keys) + prefix_at : qkv + uint64_t(key) * wide + D;
            const T *values = in_prefix ? static_cast<const T *>(p.prefix_values) + prefix_at : keys + D;
            int valid = int(in_prefix ? p.prefix : p.queries) - key;
            T *stage = shared + i % 2 * STAGE;
            load_tile<D, KEYS>(stage, keys, stride, valid);
            load_tile<D, KEYS>(stage + KEYS * D, values, stride, valid);
        }
        cp_async_commit();
    };
    load(0);

    float log_sum_exp[2], delta[2];
    UNROLL
    for (int half = 0; half < 2; half++) {
        int i = min(first + warp * 16 + half * 8 + g, end - 1);
        uint64_t at = (uint64_t(sequence) * p.heads + head) * p.queries + i;
        log_sum_exp[half] = p.log_sum_exp[at] * LOG2_E;
        delta[half] = p.delta[at];
    }
    float dq[D / 8][4];
    UNROLL
    for (int n = 0; n < D / 8; n++) dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = 0.0f;

    for (int i = 0; i < count; i++) {
        cp_async_wait<0>();
        __syncthreads(); // this stage is there, and nobody reads the other any more
        load(i + 1);
        const T *keys = shared + i % 2 * STAGE, *values = keys + KEYS * D;

        float s[KEYS / 8][4], dp[KEYS / 8][4];
        UNROLL
        for (int n = 0; n < KEYS / 8; n++) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
            dp[n][0] = dp[n][1] = dp[n][2] = dp[n][3] = 0.0f;
        }
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            UNROLL
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, keys, 16 * n, step);
                mma_pair<T>(s[2 * n], s[2 * n + 1], q[step], b);
                load_b<D>(b, values, 16 * n, step);
                mma_pair<T>(dp[2 * n], dp[2 * n + 1], d_out[step], b);
            }
        }

        bool in_prefix = i < prefix_tiles;
        int key = (in_prefix ? i : first_tile + i) * KEYS;
        bool whole = in_prefix ? key + KEYS <= int(p.prefix) : key >= each.from && key + KEYS <= each.to;
        if (!whole) {
            Mask again = Mask::load(p.spans, sequence, p.queries, p.prefix); // not kept: registers
            UNROLL
            for (int half = 0; half < 2; half++) {
                View seen = in_prefix ? View{0, int(p.prefix), false} : again.of(first + warp * 16 + half * 8 + g);
                UNROLL
                for (int n = 0; n < KEYS / 8; n++) {
                    UNROLL
                    for (int j = 0; j < 2; j++) {
                        int at = key + 8 * n + 2 * t + j;
                        // Uniform weights are constants: no gradient to q.
                        if (at < seen.from || at >= seen.to || seen.uniform) s[n][2 * half + j] = -INFINITY;
                    }
                }
            }
        }
        UNROLL
        for (int n = 0; n < KEYS / 8; n++) {
            UNROLL
            for (int j = 0; j < 4; j++) {
                s[n][j] = exp2_approx(s[n][j] * p.scale - log_sum_exp[j / 2]) * (dp[n][j] - delta[j / 2]);
            }
        }
        UNROLL
        for (int step = 0; step < KEYS / 16; step++) {
            uint32_t ds[4];
            pack_a<T>(ds, s[2 * step], s[2 * step + 1]);
            UNROLL
            for (int n = 0; n < STEPS; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, keys, 16 * step, n);
                mma_pair<T>(dq[2 * n], dq[2 * n + 1], ds, b);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    float scale = p.scale * LN_2;
    store_accumulators<D>(shared, warp * 16, dq, scale, scale);
    __syncwarp();
    T *to = static_cast<T *>(p.dqkv) + (row + first) * wide + head * (3 * D);
    store_rows<D>(to, wide, shared, warp * 16, end - first);
}

// Turing's products of k = 8 keep more of a stage in registers: there a stage has half the queries, and its second half's
// place holds k, which ptxas would spill.
#ifdef GLM_SM75
constexpr int BACKWARD_ROWS = 16;
constexpr bool KEYS_IN_REGISTERS = false;
#else
constexpr int BACKWARD_ROWS = 32;
constexpr bool KEYS_IN_REGISTERS = true;
#endif

/// Blocks: (tile of 64 keys, head, sequence), or (tile of 64 keys of a prefix, head, prefix); 4 warps of 16 keys each.
///
/// Scores are computed transposed, so that Pᵀ and dSᵀ are in registers as the next products want them. k and the gradients of
/// k and v stay in registers (with v there too, ptxas spills on some targets). Shared memory: two stages of 32 queries and
/// their dO, the 64 values, all D wide, then the stages' ln Σ exp and delta; the next stage arrives while one is worked on. The first
/// takes k to the registers.
template <typename T, int D, bool PREFIX> DEVICE void attention_backward_kv(const AttentionBackward &p) {
    constexpr int STEPS = D / 16, KEYS = GLM_ATTENTION_BACKWARD_ROWS, ROWS = BACKWARD_ROWS, STAGE = 2 * ROWS * D;
    static_assert(2 * 3 * KEYS * D == GLM_ATTENTION_BACKWARD_KV_SHARED_BYTES * D, "the host knows");
    static_assert(2 * 2 * ROWS * 4 <= GLM_ATTENTION_BACKWARD_STATISTICS_BYTES, "the host knows");
    SHARED_MEMORY(T, shared);
    T *key_tile = KEYS_IN_REGISTERS ? shared : shared + 2 * STAGE, *value_tile = shared + 2 * KEYS * D;
    float *statistics = reinterpret_cast<float *>(value_tile + KEYS * D);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int column = int(threadIdx.x) % ROWS, kind = int(threadIdx.x) / ROWS;
    uint32_t head = blockIdx.y;
    // To a prefix that they share all sequences are one.
    int rows = int(PREFIX && p.prefix_batch_stride == 0 ? p.size * p.queries : p.queries), key_count = int(PREFIX ? p.prefix : p.queries);
    int key = int(blockIdx.x) * KEYS;
    uint32_t hidden = p.heads * D, wide = 3 * hidden;
    const T *qkv = static_cast<const T *>(p.qkv) + uint64_t(blockIdx.z) * p.queries * wide + head * (3 * D);
    const T *d_context = static_cast<const T *>(p.d_context) + uint64_t(blockIdx.z) * p.queries * hidden + head * D;

    uint32_t k[KEYS_IN_REGISTERS ? STEPS : 1][4];
    {
        uint64_t prefix_at = prefix_start(p, blockIdx.z, head, D) + uint64_t(key) * D;
        const T *keys = PREFIX ? static_cast<const T *>(p.prefix_keys) + prefix_at : qkv + uint64_t(key) * wide + D;
        const T *values = PREFIX ? static_cast<const T *>(p.prefix_values) + prefix_at : keys + D;
        load_tile<D, KEYS>(key_tile, keys, PREFIX ? D : wide, key_count - key);
        load_tile<D, KEYS>(value_tile, values, PREFIX ? D : wide, key_count - key);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        if (KEYS_IN_REGISTERS) {
            UNROLL
            for (int step = 0; step < STEPS; step++) load_a<D>(k[KEYS_IN_REGISTERS ? step : 0], key_tile, warp * 16, step);
            __syncthreads();
        }
    }
    float dk[D / 8][4], dv[D / 8][4];
    UNROLL
    for (int n = 0; n < D / 8; n++) {
        dk[n][0] = dk[n][1] = dk[n][2] = dk[n][3] = 0.0f;
        dv[n][0] = dv[n][1] = dv[n][2] = dv[n][3] = 0.0f;
    }

    Mask mask = Mask::load(p.spans, blockIdx.z, p.queries, p.prefix);
    QueryTiles tiles{0, 0, (rows + ROWS - 1) / ROWS};
    if (!PREFIX) tiles = QueryTiles::of(mask, key, key + KEYS, ROWS);
    // From this query on each sees all of the keys.
    int whole = PREFIX ? 0 : key < mask.start ? INT32_MAX : max(mask.start, key + KEYS <= mask.context ? 0 : key + KEYS - 1);

    float statistic = 0.0f;
    auto load = [&](int i, int stage) {
        if (i < tiles.end) {
            int first = i * ROWS;
            const T *q = qkv + uint64_t(first) * wide;
            const T *d_out = d_context + uint64_t(first) * hidden;
            load_tile<D, ROWS>(shared + stage * STAGE, q, wide, rows - first);
            load_tile<D, ROWS>(shared + stage * STAGE + ROWS * D, d_out, hidden, rows - first);
            if (kind < 2) {
                uint32_t row = blockIdx.z * p.queries + first + column;
                uint64_t at = (uint64_t(row / p.queries) * p.heads + head) * p.queries + row % p.queries;
                // Behind the last query: p = 2^-infinity.
                statistic = kind == 0 ? INFINITY : 0.0f;
                if (first + column < rows) statistic = kind == 0 ? p.log_sum_exp[at] * LOG2_E : p.delta[at];
            }
        }
        cp_async_commit();
    };
    load(tiles.begin(), 0);

    int stage = 0;
    for (int i = tiles.begin(); i < tiles.end; i = tiles.next(i), stage ^= 1) {
        float *numbers = statistics + stage * 2 * ROWS;
        if (kind < 2) numbers[threadIdx.x] = statistic;
        cp_async_wait<0>();
        __syncthreads(); // this stage is there, and nobody reads the other any more
        load(tiles.next(i), stage ^ 1);
        const T *q = shared + stage * STAGE, *d_out = q + ROWS * D;
        int first = i * ROWS;

        float s[ROWS / 8][4], dp[ROWS / 8][4];
        UNROLL
        for (int n = 0; n < ROWS / 8; n++) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
            dp[n][0] = dp[n][1] = dp[n][2] = dp[n][3] = 0.0f;
        }
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            uint32_t v[4], (&a)[4] = k[KEYS_IN_REGISTERS ? step : 0];
            load_a<D>(v, value_tile, warp * 16, step);
            if (!KEYS_IN_REGISTERS) load_a<D>(a, key_tile, warp * 16, step);
            UNROLL
            for (int n = 0; n < ROWS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, q, 16 * n, step);
                mma_pair<T>(s[2 * n], s[2 * n + 1], a, b);
                load_b<D>(b, d_out, 16 * n, step);
                mma_pair<T>(dp[2 * n], dp[2 * n + 1], v, b);
            }
        }
        UNROLL
        for (int n = 0; n < ROWS / 8; n++) {
            UNROLL
            for (int j = 0; j < 4; j++) {
                int query = 8 * n + 2 * t + j % 2;
                s[n][j] = exp2_approx(s[n][j] * p.scale - numbers[query]);
                dp[n][j] = s[n][j] * (dp[n][j] - numbers[ROWS + query]);
            }
        }
        if (first < whole) {
            Mask again = Mask::load(p.spans, blockIdx.z, p.queries, p.prefix); // not kept: registers
            UNROLL
            for (int n = 0; n < ROWS / 8; n++) {
                UNROLL
                for (int j = 0; j < 4; j++) {
                    View seen = again.of(first + 8 * n + 2 * t + j % 2);
                    int at = key + warp * 16 + j / 2 * 8 + g;
                    bool visible = at >= seen.from && at < seen.to;
                    s[n][j] = !visible ? 0.0f : seen.uniform ? 1.0f / float(p.queries) : s[n][j];
                    dp[n][j] = !visible || seen.uniform ? 0.0f : dp[n][j];
                }
            }
        }
        UNROLL
        for (int step = 0; step < ROWS / 16; step++) {
            uint32_t weights[4], slopes[4];
            pack_a<T>(weights, s[2 * step], s[2 * step + 1]);
            pack_a<T>(slopes, dp[2 * step], dp[2 * step + 1]);
            UNROLL
            for (int n = 0; n < STEPS; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, d_out, 16 * step, n);
                mma_pair<T>(dv[2 * n], dv[2 * n + 1], weights, b);
                load_b_trans<D>(b, q, 16 * step, n);
                mma_pair<T>(dk[2 * n], dk[2 * n + 1], slopes, b);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    float scale = p.scale * LN_2;
    if constexpr (PREFIX) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            int at = key + warp * 16 + half * 8 + g;
            if (at >= key_count) continue;
            uint64_t to = prefix_start(p, blockIdx.z, head, D) + uint64_t(at) * D;
            UNROLL
            for (int n = 0; n < D / 8; n++) {
                UNROLL
                for (int j = 0; j < 2; j++) {
                    p.d_prefix_keys[to + 8 * n + 2 * t + j] += dk[n][2 * half + j] * scale;
                    p.d_prefix_values[to + 8 * n + 2 * t + j] += dv[n][2 * half + j];
                }
            }
        }
    } else {
        store_accumulators<D>(key_tile, warp * 16, dk, scale, scale);
        store_accumulators<D>(value_tile, warp * 16, dv, 1.0f, 1.0f);
        __syncwarp();
        T *to = static_cast<T *>(p.dqkv) + (uint64_t(blockIdx.z) * p.queries + key) * wide + head * (3 * D);
        store_rows<D>(to + D, wide, key_tile, warp * 16, key_count - key);
        store_rows<D>(to + 2 * D, wide, value_tile, warp * 16, key_count - key);
    }
}

// static: attention_backward_q_d16 threads=128 shared=4096 expect=mma,load16
// static: attention_backward_kv_d16 threads=128 shared=6656 expect=mma,load16
// static: attention_backward_prefix_d16 threads=128 shared=6656 expect=mma,load16
// static: attention_backward_q_d32 threads=128 shared=8192 expect=mma,load16
// static: attention_backward_kv_d32 threads=128 shared=12800 expect=mma,load16
// static: attention_backward_prefix_d32 threads=128 shared=12800 expect=mma,load16
// static: attention_backward_q_d64 threads=128 shared=16384 expect=mma,load16
// static: attention_backward_kv_d64 threads=128 shared=25088 expect=mma,load16
// static: attention_backward_prefix_d64 threads=128 shared=25088 expect=mma,load16
// static: attention_backward_q_d128 threads=128 shared=32768 expect=mma,load16
// static: attention_backward_kv_d128 threads=128 shared=49664 expect=mma,load16
// static: attention_backward_prefix_d128 threads=128 shared=49664 expect=mma,load16
#define ATTENTION_BACKWARD(suffix, T, D)                                                                     \
    KERNEL_MIN(attention_backward_q_d##D##suffix, AttentionBackward, 128, 2) { attention_backward_q<T, D>(p); } \
    KERNEL_MIN(attention_backward_kv_d##D##suffix, AttentionBackward, 128, 2) {                              \
        attention_backward_kv<T, D, false>(p);                                                               \
    }                                                                                                        \
    KERNEL_MIN(attention_backward_prefix_d##D##suffix, AttentionBackward, 128, 2) {                          \
        attention_backward_kv<T, D, true>(p);                                                                \
    }
#define ATTENTION_BACKWARD_ALL(suffix, T)                                                                    \
    ATTENTION_BACKWARD(suffix, T, 16)                                                                        \
    ATTENTION_BACKWARD(suffix, T, 32)                                                                        \
    ATTENTION_BACKWARD(suffix, T, 64)                                                                        \
    ATTENTION_BACKWARD(suffix, T, 128)

ATTENTION_BACKWARD_ALL(_f16, half_t)
#if GLM_HAS_BF16
ATTENTION_BACKWARD_ALL(_bf16, bf16_t)
#endif
