/// The prefix of P-Tuning v2: from the encoder's table to the keys and values of a layer, and back; tanh of its projection.
#include "compat.cuh"
#include "kernels.h"
#include "rng.cuh"
#include "span.cuh"
#include "types.cuh"

/// Drops elements out of `values`, which are number `at` and those behind it of all that dropout sees.
template <typename P, int N> DEVICE void drop(float (&values)[N], const P &p, uint64_t at) {
    if (p.p == 0.0f) {
        return;
    }
    constexpr int TOGETHER = N % 4 == 0 ? 4 : 1;
    UNROLL
    for (int i = 0; i < N; i += TOGETHER) {
        uint32_t words[4];
        philox(words, p.seed, p.stream, (at + i) / 4);
        UNROLL
        for (int j = 0; j < TOGETHER; j++) {
            const uint32_t word = TOGETHER == 4 ? j : (at + i) % 4;
            const uint32_t bits = word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3];
            values[i + j] = uniform(bits) >= p.p ? values[i + j] * p.scale : 0.0f;
        }
    }
}

/// Calls `f(access, span, column)` for the thread's columns of a row of `p.heads * p.head_dim`: 8 neighbours within a head, so
/// that a block of the generator serves four of them, or single ones where heads are no multiples of 8.
template <typename P, typename F> DEVICE void own_columns(const P &p, bool aligned, F f) {
    constexpr uint32_t N = GLM_PREFIX_SPAN;
    const uint32_t width = p.heads * p.head_dim, column = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (aligned && p.head_dim % N == 0 && p.columns % 4 == 0 && p.first % 4 == 0) {
        if (column < width) {
            float span[N];
            f(Vectors{}, span, column);
        }
    } else {
        for (uint32_t c = column; c < min(column + N, width); c++) {
            float span[1];
            f(Singles{}, span, c);
        }
    }
}

/// Blocks: (position of a sequence's prefix, strip of columns).
template <typename T> DEVICE void prefix_heads(const PrefixHeads &p) {
    const uint32_t sequence = blockIdx.x / p.length, position = blockIdx.x % p.length;
    own_columns(p, aligned_16(p.y, p.table), [&](auto access, auto &values, uint32_t column) {
        const uint64_t in_row = uint64_t(p.first) + column;
        access.load(values, p.table + uint64_t(position) * p.columns + in_row, GLM_PREFIX_SPAN);
        drop(values, p, uint64_t(blockIdx.x) * p.columns + in_row);
        const uint64_t head = uint64_t(sequence) * p.heads + column / p.head_dim;
        T *to = static_cast<T *>(p.y) + (head * p.length + position) * p.head_dim + column % p.head_dim;
        access.store(to, values, GLM_PREFIX_SPAN);
    });
}
// static: prefix_heads expect=load16
KERNELS_FOR_TYPES(prefix_heads, PrefixHeads, GLM_PREFIX_THREADS)

/// Blocks: (position, strip of columns). A thread adds up the sequences in their order.
// static: prefix_heads_backward_f32 expect=load16
KERNEL(prefix_heads_backward_f32, PrefixHeadsBackward, GLM_PREFIX_THREADS) {
    const uint32_t position = blockIdx.x;
    own_columns(p, aligned_16(p.d_table, p.dy), [&](auto access, auto &sums, uint32_t column) {
        constexpr int N = sizeof(sums) / sizeof(float);
        const uint64_t in_row = uint64_t(p.first) + column;
        float *to = p.d_table + uint64_t(position) * p.columns + in_row;
        access.load(sums, to, N);
        for (uint32_t sequence = 0; sequence < p.size; sequence++) {
            const uint64_t head = uint64_t(sequence) * p.heads + column / p.head_dim;
            float d[N];
            access.load(d, p.dy + (head * p.length + position) * p.head_dim + column % p.head_dim, N);
            drop(d, p, (uint64_t(sequence) * p.length + position) * p.columns + in_row);
            UNROLL
            for (int i = 0; i < N; i++) {
                sums[i] += d[i];
            }
        }
        access.store(to, sums, N);
    });
}

/// Each thread: 16 bytes.
// static: tanh_forward_f32 expect=load16
KERNEL(tanh_forward_f32, Tanh, GLM_PREFIX_THREADS) {
    own_span<4>(p.n, aligned_16(p.x, p.y), [&](auto access, uint64_t i, uint32_t left) {
        float values[4];
        access.load(values, p.x + i, left);
        UNROLL
        for (int j = 0; j < 4; j++) {
            values[j] = tanhf(values[j]);
        }
        access.store(p.y + i, values, left);
    });
}

/// Each thread: 16 bytes.
// static: tanh_backward_f32 expect=load16
KERNEL(tanh_backward_f32, TanhBackward, GLM_PREFIX_THREADS) {
    own_span<4>(p.n, aligned_16(p.y, p.d), [&](auto access, uint64_t i, uint32_t left) {
        float y[4], d[4];
        access.load(y, p.y + i, left);
        access.load(d, p.d + i, left);
        UNROLL
        for (int j = 0; j < 4; j++) {
            d[j] *= 1.0f - y[j] * y[j];
        }
        access.store(p.d + i, d, left);
    });
}
