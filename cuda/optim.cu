/// The optimizer over all parameters at once, and what looks for numbers that are none.
#include "compat.cuh"
#include "kernels.h"
#include "optim.cuh"
#include "span.cuh"
#include "types.cuh"

/// Calls `f(access, i, left)` for each span of `N` elements from `i` on that falls to this thread of a block's `n`.
template <int N, typename F> DEVICE void spans_of_block(uint32_t n, bool aligned, F f) {
    for (uint32_t i = threadIdx.x * N; i < n; i += blockDim.x * N) {
        by_access(aligned && n - i >= N, [&](auto access) { f(access, i, min(n - i, uint32_t(N))); });
    }
}

/// Folds one value of each thread into that of thread 0, in an order that depends on `blockDim.x`, a power of two, only.
/// Shared memory: one value a thread.
template <typename V, typename Combine> DEVICE V fold_block(V value, Combine combine) {
    SHARED_MEMORY(V, shared);
    shared[threadIdx.x] = value;
    for (uint32_t half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
        }
    }
    return shared[threadIdx.x];
}

DEVICE double fold_sum(double value) {
    return fold_block(value, [](double a, double b) { return a + b; });
}

/// Each block: one chunk.
KERNEL(adamw, Adamw, GLM_OPTIM_THREADS) {
    constexpr int N = Vec<float>::N;
    const AdamwChunk chunk = p.chunks[blockIdx.x];
    const bool aligned = aligned_16(chunk.p, chunk.g, chunk.m, chunk.v);
    spans_of_block<N>(chunk.n, aligned, [&](auto access, uint32_t i, uint32_t left) {
        float value[N], g[N], m[N], v[N];
        access.load(value, chunk.p + i, left);
        access.load(g, chunk.g + i, left);
        access.load(m, chunk.m + i, left);
        access.load(v, chunk.v + i, left);
        UNROLL
        for (int j = 0; j < N; j++) {
            adamw_element(value[j], g[j], m[j], v[j], chunk.decay, chunk.step_size, p.factors);
        }
        access.store(chunk.p + i, value, left);
        access.store(chunk.m + i, m, left);
        access.store(chunk.v + i, v, left);
    });
}

/// Each block: one chunk.
KERNEL(sgd, Sgd, GLM_OPTIM_THREADS) {
    constexpr int N = Vec<float>::N;
    const MomentumChunk chunk = p.chunks[blockIdx.x];
    const bool has_momentum = chunk.m != nullptr;
    spans_of_block<N>(chunk.n, aligned_16(chunk.p, chunk.g, chunk.m), [&](auto access, uint32_t i, uint32_t left) {
        float value[N], g[N], m[N];
        access.load(value, chunk.p + i, left);
        access.load(g, chunk.g + i, left);
        access.load(m, chunk.m + i, has_momentum ? left : 0);
        UNROLL
        for (int j = 0; j < N; j++) {
            const float gradient = __fmul_rn(g[j], p.clip) + __fmul_rn(chunk.decay, value[j]);
            m[j] = has_momentum ? __fmul_rn(p.momentum, m[j]) + gradient : gradient;
            value[j] -= __fmul_rn(chunk.rate, m[j]);
        }
        access.store(chunk.p + i, value, left);
        access.store(chunk.m + i, m, has_momentum ? left : 0);
    });
}

/// Each block: one chunk.
KERNEL(lion, Lion, GLM_OPTIM_THREADS) {
    constexpr int N = Vec<float>::N;
    const LionFactors &f = p.factors;
    const MomentumChunk chunk = p.chunks[blockIdx.x];
    spans_of_block<N>(chunk.n, aligned_16(chunk.p, chunk.g, chunk.m), [&](auto access, uint32_t i, uint32_t left) {
        float value[N], g[N], m[N];
        access.load(value, chunk.p + i, left);
        access.load(g, chunk.g + i, left);
        access.load(m, chunk.m + i, left);
        UNROLL
        for (int j = 0; j < N; j++) {
            const float gradient = __fmul_rn(g[j], f.clip);
            const float mean = __fmul_rn(f.beta1, m[j]) + __fmul_rn(f.one_minus_beta1, gradient);
            // 0 stays 0, and what is no number stays none.
            const float sign = mean > 0.0f ? 1.0f : mean < 0.0f ? -1.0f : mean;
            value[j] = __fmul_rn(value[j], chunk.decay) - __fmul_rn(chunk.rate, sign);
            m[j] = __fmul_rn(f.beta2, m[j]) + __fmul_rn(f.one_minus_beta2, gradient);
        }
        access.store(chunk.p + i, value, left);
        access.store(chunk.m + i, m, left);
    });
}

/// Each block: one chunk. In double: a gradient that is finite has a finite square. Shared memory: a double a thread.
// static: sum_of_squares shared=2048
KERNEL(sum_of_squares, SumOfSquares, GLM_OPTIM_THREADS) {
    constexpr int N = Vec<float>::N;
    const FloatChunk chunk = p.chunks[blockIdx.x];
    double sum = 0.0;
    spans_of_block<N>(chunk.n, aligned_16(chunk.x), [&](auto access, uint32_t i, uint32_t left) {
        float values[N];
        access.load(values, chunk.x + i, left);
        UNROLL
        for (int j = 0; j < N; j++) {
            sum += double(values[j]) * double(values[j]);
        }
    });
    sum = fold_sum(sum);
    if (threadIdx.x == 0) {
        p.partials[blockIdx.x] = sum;
    }
}

/// Each block: one chunk.
KERNEL(zero_chunks, ZeroChunks, GLM_OPTIM_THREADS) {
    constexpr int N = Vec<float>::N;
    const FloatChunk chunk = p.chunks[blockIdx.x];
    spans_of_block<N>(chunk.n, aligned_16(chunk.x), [&](auto access, uint32_t i, uint32_t left) {
        const float zeros[N] = {};
        access.store(chunk.x + i, zeros, left);
    });
}

/// Each block: one part of the elements. Shared memory: a `NonFinite` a thread.
template <typename T> DEVICE void count_non_finite(const CountNonFinite &p) {
    constexpr int N = Vec<T>::N;
    // Parts begin at multiples of a vector.
    const uint64_t part = (p.n + gridDim.x * N - 1) / (gridDim.x * N) * N;
    const uint64_t start = min(part * blockIdx.x, p.n), end = min(start + part, p.n);
    const bool aligned = aligned_16(p.x);
    NonFinite own = {p.n, 0};
    for (uint64_t i = start + threadIdx.x * N; i < end; i += blockDim.x * N) {
        const uint32_t left = uint32_t(min(end - i, uint64_t(N)));
        by_access(aligned && left == N, [&](auto access) {
            float values[N];
            access.load(values, static_cast<const T *>(p.x) + i, left);
            UNROLL
            for (int j = 0; j < N; j++) {
                if ((__float_as_uint(values[j]) & 0x7f800000u) == 0x7f800000u) {
                    own.first = min(own.first, i + j);
                    own.count++;
                }
            }
        });
    }
    own = fold_block(own, [](const NonFinite &a, const NonFinite &b) {
        return NonFinite{min(a.first, b.first), a.count + b.count};
    });
    if (threadIdx.x == 0) {
        p.found[blockIdx.x] = own;
    }
}
// static: count_non_finite shared=4096 expect=load16
KERNELS_FOR_TYPES(count_non_finite, CountNonFinite, GLM_OPTIM_THREADS)
