/// Elementwise functions, one pass over memory each.
#include "compat.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "rng.cuh"
#include "span.cuh"
#include "types.cuh"

// sqrt(2 / pi) and the cubic coefficient of the tanh form of GELU (Hendrycks and Gimpel 2016).
constexpr float GELU_A = 0.7978845608028654f;
constexpr float GELU_B = 0.044715f;

/// The logistic function of 2u with u = A (x + B x^3): 0.5 (1 + tanh u) without its cancellation.
///
/// By `ex2` and `rcp`, each good to about 2^-22: a division in full precision would cost more than the memory does.
DEVICE float gelu_gate(float x) {
    constexpr float LOG2_E = 1.4426950408889634f;
    const float u = GELU_A * (x + GELU_B * x * x * x);
    return reciprocal_approx(1.0f + exp2_approx(-2.0f * LOG2_E * u));
}

/// Each thread: 16 bytes.
template <typename T> DEVICE void gelu_forward(const GeluForward &p) {
    constexpr int N = Vec<T>::N;
    own_span<N>(p.n, aligned_16(p.x, p.y), [&](auto access, uint64_t i, uint32_t left) {
        float values[N];
        access.load(values, static_cast<const T *>(p.x) + i, left);
        UNROLL
        for (int j = 0; j < N; j++) {
            values[j] *= gelu_gate(values[j]);
        }
        access.store(static_cast<T *>(p.y) + i, values, left);
    });
}
// static: gelu_forward expect=load16
KERNELS_FOR_TYPES(gelu_forward, GeluForward, GLM_POINTWISE_THREADS)

/// Each thread: 16 bytes.
template <typename T> DEVICE void gelu_backward(const GeluBackward &p) {
    constexpr int N = Vec<T>::N;
    own_span<N>(p.n, aligned_16(p.x, p.d), [&](auto access, uint64_t i, uint32_t left) {
        float values[N], d[N];
        access.load(values, static_cast<const T *>(p.x) + i, left);
        access.load(d, static_cast<const T *>(p.d) + i, left);
        UNROLL
        for (int j = 0; j < N; j++) {
            const float x = values[j];
            const float s = gelu_gate(x);
            const float slope = GELU_A * (1.0f + 3.0f * GELU_B * x * x);
            d[j] *= s + (x + x) * s * (1.0f - s) * slope;
        }
        access.store(static_cast<T *>(p.d) + i, d, left);
    });
}
// static: gelu_backward expect=load16
KERNELS_FOR_TYPES(gelu_backward, GeluBackward, GLM_POINTWISE_THREADS)

/// Each thread: 16 bytes; four neighbours share a block of the generator.
template <typename T> DEVICE void dropout(const Dropout &p) {
    constexpr int N = Vec<T>::N;
    own_span<N>(p.n, aligned_16(p.x, p.y), [&](auto access, uint64_t i, uint32_t left) {
        float values[N], y[N] = {};
        access.load(values, static_cast<const T *>(p.x) + i, left);
        if (p.then == GLM_DROPOUT_ACCUMULATE) {
            access.load(y, static_cast<const T *>(p.y) + i, left);
        }
        UNROLL
        for (int j = 0; j < N; j += 4) {
            uint32_t words[4];
            philox(words, p.seed, p.stream, (i + j) / 4);
            UNROLL
            for (int k = 0; k < 4; k++) {
                const float value = uniform(words[k]) >= p.p ? values[j + k] * p.scale : 0.0f;
                y[j + k] = p.then == GLM_DROPOUT_REST ? values[j + k] - value : y[j + k] + value;
            }
        }
        access.store(static_cast<T *>(p.y) + i, y, left);
    });
}
// static: dropout expect=load16
KERNELS_FOR_TYPES(dropout, Dropout, GLM_POINTWISE_THREADS)

/// Each thread: 16 bytes; four neighbours share a block of the generator.
template <typename T> DEVICE void noise(const Noise &p) {
    constexpr int N = Vec<T>::N;
    own_span<N>(p.n, aligned_16(p.y), [&](auto access, uint64_t i, uint32_t left) {
        float y[N];
        access.load(y, static_cast<const T *>(p.y) + i, left);
        UNROLL
        for (int j = 0; j < N; j += 4) {
            uint32_t words[4];
            philox(words, p.seed, p.stream, (i + j) / 4);
            UNROLL
            for (int k = 0; k < 4; k++) {
                y[j + k] += p.bound * (2.0f * uniform(words[k]) - 1.0f);
            }
        }
        access.store(static_cast<T *>(p.y) + i, y, left);
    });
}
// static: noise expect=load16
KERNELS_FOR_TYPES(noise, Noise, GLM_POINTWISE_THREADS)

/// Turns what one thread owns of a row: `N` neighbouring pairs of every head that falls to it.
///
/// A row holds, for each of `heads`, q, k and v. The first half of q turns by the row's position, the second by its block
/// position; within a half, element `i` and the one `head_dim / 4` further form a pair. Threads lie along the pairs of
/// one part first: neighbours touch neighbouring memory, and a thread keeps its cosines and sines for all heads.
template <typename T, int N, typename Access> DEVICE void rope_row(const Rope &p, Access access) {
    const uint32_t quarter = p.head_dim / 4, half = 2 * quarter;
    const uint32_t spans = half / N;
    const uint32_t lanes = min(spans, blockDim.x), units = blockDim.x / lanes;
    const uint32_t row = blockIdx.x;
    T *qkv = static_cast<T *>(p.qkv) + uint64_t(row) * p.heads * 3 * p.head_dim;
    if (threadIdx.x >= lanes * units) {
        return;
    }
    for (uint32_t span = threadIdx.x % lanes; span < spans; span += lanes) {
        const uint32_t axis = span * N / quarter, pair = span * N % quarter;
        const int32_t position = p.positions[2 * row + axis];
        const bool inside = position >= 0 && uint32_t(position) < p.position_count;
        const float *table = p.tables + uint64_t(inside ? position : 0) * half + pair;
        float cosines[N], sines[N];
        access.load(cosines, table, N);
        access.load(sines, table + quarter, N);
        UNROLL
        for (int i = 0; i < N; i++) {
            cosines[i] = inside ? cosines[i] : NOT_A_NUMBER;
            sines[i] *= p.sign;
        }
        for (uint32_t part = threadIdx.x / lanes; part < 2 * p.heads; part += units) {
            T *a = qkv + (part / 2 * 3 + part % 2) * p.head_dim + axis * half + pair, *b = a + quarter;
            float first[N], second[N];
            access.load(first, a, N);
            access.load(second, b, N);
            UNROLL
            for (int i = 0; i < N; i++) {
                const float x = first[i], y = second[i];
                first[i] = x * cosines[i] - y * sines[i];
                second[i] = y * cosines[i] + x * sines[i];
            }
            access.store(a, first, N);
            access.store(b, second, N);
        }
    }
}

/// Each block: one row of `qkv`.
template <typename T> DEVICE void rope(const Rope &p) {
    if (p.head_dim / 4 % Vec<T>::N == 0 && aligned_16(p.qkv, p.tables)) {
        rope_row<T, Vec<T>::N>(p, Vectors{});
    } else {
        rope_row<T, 1>(p, Singles{});
    }
}
// static: rope expect=load16
KERNELS_FOR_TYPES(rope, Rope, GLM_POINTWISE_THREADS)

/// Each thread: 16 bytes of the narrower type.
template <typename From, typename To> DEVICE void cast(const Cast &p) {
    constexpr int N = Vec<From>::N > Vec<To>::N ? Vec<From>::N : Vec<To>::N;
    own_span<N>(p.n, aligned_16(p.x, p.y), [&](auto access, uint64_t i, uint32_t left) {
        float values[N];
        access.load(values, static_cast<const From *>(p.x) + i, left);
        access.store(static_cast<To *>(p.y) + i, values, left);
    });
}
// static: cast_* expect=load16
KERNEL(cast_f32_f16, Cast, GLM_POINTWISE_THREADS) { cast<float, half_t>(p); }
KERNEL(cast_f16_f32, Cast, GLM_POINTWISE_THREADS) { cast<half_t, float>(p); }
#if GLM_HAS_BF16
KERNEL(cast_f32_bf16, Cast, GLM_POINTWISE_THREADS) { cast<float, bf16_t>(p); }
KERNEL(cast_bf16_f32, Cast, GLM_POINTWISE_THREADS) { cast<bf16_t, float>(p); }
KERNEL(cast_f16_bf16, Cast, GLM_POINTWISE_THREADS) { cast<half_t, bf16_t>(p); }
KERNEL(cast_bf16_f16, Cast, GLM_POINTWISE_THREADS) { cast<bf16_t, half_t>(p); }
#endif
