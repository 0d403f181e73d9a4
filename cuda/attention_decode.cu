/// Attention of one new token for each sequence over a cache of keys and values: every key is read once, by one block of many.
#include "attention.cuh"
#include "compat.cuh"
#include "kernels.h"
#include "reduce.cuh"
#include "types.cuh"

/// A thread for 16 bytes of k and v of a row each, or for one element where a head is no multiple of 16 bytes.
template <typename T> DEVICE void kv_append(const KvAppend &p) {
    constexpr uint32_t N = Vec<T>::N;
    uint32_t width = p.head_dim % N == 0 ? N : 1, hidden = p.heads * p.head_dim, pieces = hidden / width;
    uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= uint64_t(p.rows) * pieces) return;
    uint64_t row = i / pieces;
    uint32_t c = uint32_t(i % pieces) * width, head = c / p.head_dim;
    const T *k = static_cast<const T *>(p.qkv) + row * 3 * hidden + (2 * head + 1) * p.head_dim + c;
    const T *v = k + p.head_dim;
    uint64_t to = (row / p.queries * p.capacity + p.past + row % p.queries) * hidden + c;
    T *keys = static_cast<T *>(p.keys) + to, *values = static_cast<T *>(p.values) + to;
    if (width > 1) {
        Vec<T>::load(k).store(keys);
        Vec<T>::load(v).store(values);
    } else {
        *keys = *k;
        *values = *v;
    }
}

// static: kv_append threads=256 expect=load16
KERNELS_FOR_TYPES(kv_append, KvAppend, GLM_KV_APPEND_THREADS)

/// Keys of a block.
constexpr int CHUNK = GLM_ATTENTION_CHUNK;

/// Blocks: (chunk, head, sequence); 4 warps. A group of D / N lanes holds one row of N-element pieces, so that a warp's load is
/// of 512 neighbouring bytes of each of its keys; its keys' scores stay in registers between keys and values.
///
/// Shared memory: the 4 warps' partial results, D + 2 floats each. D / N is a power of two up to 32.
template <typename T, int D> DEVICE void attention_decode(const AttentionDecode &p) {
    constexpr int N = Vec<T>::N, GROUP = D / N, GROUPS = 32 / GROUP, WARPS = GLM_ATTENTION_THREADS / 32, EACH = CHUNK / (WARPS * GROUPS);
    static_assert(GROUP <= 32 && EACH >= 1, "a chunk has a key for every group");
    SHARED_MEMORY(float, shared);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t head = blockIdx.y, sequence = blockIdx.z, hidden = p.heads * D, c = lane % GROUP * N;
    int prefix_chunks = (int(p.prefix) + CHUNK - 1) / CHUNK;
    bool in_prefix = int(blockIdx.x) < prefix_chunks;
    uint32_t stride = in_prefix ? D : hidden;
    Mask mask = Mask::load(p.spans, sequence, p.key_count, p.prefix);
    View seen = in_prefix ? View{0, int(p.prefix), false} : mask.of(int(p.key_count) - 1);
    int chunk = (int(blockIdx.x) - (in_prefix ? 0 : prefix_chunks)) * CHUNK;
    uint64_t item = uint64_t(sequence) * p.heads + head;
    float *partial = p.partial + (item * gridDim.x + blockIdx.x) * (D + 2);
    if (chunk + CHUNK <= seen.from || chunk >= seen.to) {
        for (int i = int(threadIdx.x); i < D + 2; i += 32 * WARPS) partial[i] = i == D ? -INFINITY : 0.0f;
        return;
    }
    int first = chunk + warp * GROUPS + lane / GROUP;
    // Unseen keys are computed like the nearest seen one and get the weight 0: branches would keep loads apart.
    auto near = [&](int i) { return uint64_t(min(max(first + i * WARPS * GROUPS, seen.from), seen.to - 1)) * stride; };
    uint64_t at = in_prefix ? prefix_start(p, sequence, head, D) : uint64_t(sequence) * p.capacity * hidden + head * D;
    const T *keys = static_cast<const T *>(in_prefix ? p.prefix_keys : p.keys) + at + c;
    const T *values = static_cast<const T *>(in_prefix ? p.prefix_values : p.values) + at + c;

    Vec<T> q = Vec<T>::load(static_cast<const T *>(p.qkv) + uint64_t(sequence) * 3 * hidden + head * 3 * D + c);
    Vec<T> rows[EACH];
    UNROLL
    for (int i = 0; i < EACH; i++) rows[i] = Vec<T>::load(keys + near(i));
    float scores[EACH], top = -INFINITY;
    UNROLL
    for (int i = 0; i < EACH; i++) {
        int key = first + i * WARPS * GROUPS;
        float dot = 0.0f;
        UNROLL
        for (int j = 0; j < N; j++) dot += q.get(j) * rows[i].get(j);
        UNROLL
        for (int offset = GROUP / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xFFFFFFFFu, dot, offset);
        scores[i] = key < seen.from || key >= seen.to ? -INFINITY : seen.uniform ? 0.0f : dot * p.scale;
        top = fmaxf(top, scores[i]);
    }
    UNROLL
    for (int i = 0; i < EACH; i++) rows[i] = Vec<T>::load(values + near(i));
    top = warp_max(top);
    float reference = top == -INFINITY ? 0.0f : top;
    float total = 0.0f, out[N];
    UNROLL
    for (int j = 0; j < N; j++) out[j] = 0.0f;
    UNROLL
    for (int i = 0; i < EACH; i++) {
        float weight = exp2_approx(scores[i] - reference);
        total += weight;
        UNROLL
        for (int j = 0; j < N; j++) out[j] += weight * rows[i].get(j);
    }
    UNROLL
    for (int offset = GROUP; offset < 32; offset *= 2) {
        total += __shfl_xor_sync(0xFFFFFFFFu, total, offset);
        UNROLL
        for (int j = 0; j < N; j++) out[j] += __shfl_xor_sync(0xFFFFFFFFu, out[j], offset);
    }
    if (lane < GROUP) {
        UNROLL
        for (int j = 0; j < N; j++) shared[warp * (D + 2) + c + j] = out[j];
    }
    if (lane == 0) {
        shared[warp * (D + 2) + D] = top;
        shared[warp * (D + 2) + D + 1] = total;
    }
    __syncthreads();

    float highest = -INFINITY, sum = 0.0f;
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, shared[w * (D + 2) + D]);
    float shrink[WARPS];
    for (int w = 0; w < WARPS; w++) {
        shrink[w] = exp2_approx(shared[w * (D + 2) + D] - highest);
        sum += shared[w * (D + 2) + D + 1] * shrink[w];
    }
    bool alone = gridDim.x == 1;
    int i = int(threadIdx.x);
    if (i < D) {
        float x = 0.0f;
        for (int w = 0; w < WARPS; w++) x += shared[w * (D + 2) + i] * shrink[w];
        if (alone) {
            static_cast<T *>(p.context)[item * D + i] = from_float<T>(x / sum);
        } else {
            partial[i] = x;
        }
    }
    if (i == 0) {
        if (alone) {
            p.log_sum_exp[item] = seen.uniform ? 0.0f : (highest + log2f(sum)) * LN_2;
        } else {
            partial[D] = highest;
            partial[D + 1] = sum;
        }
    }
}

// static: attention_decode_d16 threads=128 shared=288 expect=load16
// static: attention_decode_d32 threads=128 shared=544 expect=load16
// static: attention_decode_d64 threads=128 shared=1056 expect=load16
// static: attention_decode_d128 threads=128 shared=2080 expect=load16
#define ATTENTION_DECODE(suffix, T)                                                                          \
    KERNEL_MIN(attention_decode_d16##suffix, AttentionDecode, 128, 4) { attention_decode<T, 16>(p); } \
    KERNEL_MIN(attention_decode_d32##suffix, AttentionDecode, 128, 4) { attention_decode<T, 32>(p); } \
    KERNEL_MIN(attention_decode_d64##suffix, AttentionDecode, 128, 4) { attention_decode<T, 64>(p); } \
    KERNEL_MIN(attention_decode_d128##suffix, AttentionDecode, 128, 4) { attention_decode<T, 128>(p); }

ATTENTION_DECODE(_f32, float)
ATTENTION_DECODE(_f16, half_t)
#if GLM_HAS_BF16
ATTENTION_DECODE(_bf16, bf16_t)
#endif

/// Blocks: (head, sequence); a thread for each element of a head (blockDim.x >= head_dim), chunks in order.
template <typename T> DEVICE void attention_combine(const AttentionCombine &p) {
    uint32_t d = p.head_dim, c = threadIdx.x;
    uint64_t item = uint64_t(blockIdx.y) * p.heads + blockIdx.x;
    const float *partial = p.partial + item * p.chunks * (d + 2);
    float highest = -INFINITY, sum = 0.0f, x = 0.0f;
    for (uint32_t i = 0; i < p.chunks; i++) highest = fmaxf(highest, partial[i * (d + 2) + d]);
    for (uint32_t i = 0; i < p.chunks; i++) {
        const float *chunk = partial + i * (d + 2);
        float shrink = exp2_approx(chunk[d] - highest);
        sum += chunk[d + 1] * shrink;
        if (c < d) x += chunk[c] * shrink;
    }
    if (c < d) static_cast<T *>(p.context)[item * d + c] = from_float<T>(x / sum);
    if (c == 0) {
        bool uniform = Mask::load(p.spans, blockIdx.y, p.key_count, p.prefix).of(int(p.key_count) - 1).uniform;
        p.log_sum_exp[item] = uniform ? 0.0f : (highest + log2f(sum)) * LN_2;
    }
}

// static: attention_combine threads=128
KERNELS_FOR_TYPES(attention_combine, AttentionCombine, 128)
