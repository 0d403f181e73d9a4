/// DoRA (Liu et al. 2024): row norms of an adapted weight, and factors on columns.
#include "compat.cuh"
#include "kernels.h"
#include "reduce.cuh"
#include "span.cuh"
#include "types.cuh"

/// Each block: one row. Shared memory: that of `block_sum`.
template <typename T> DEVICE void row_squares(const RowSquares &p) {
    constexpr int N = Vec<T>::N;
    SHARED_MEMORY(float, scratch);
    const T *row = static_cast<const T *>(p.w) + uint64_t(blockIdx.x) * p.k;
    float sum = 0.0f;
    by_access(aligned_16(p.w, p.k * sizeof(T)), [&](auto access) {
        for (uint32_t k = threadIdx.x * N; k < p.k; k += blockDim.x * N) {
            float values[N];
            access.load(values, row + k, p.k - k);
            UNROLL
            for (int i = 0; i < N; i++) {
                sum += values[i] * values[i];
            }
        }
    });
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        p.squares[blockIdx.x] = sum;
    }
}
// static: row_squares shared=128 expect=load16
KERNELS_FOR_TYPES(row_squares, RowSquares, GLM_DORA_THREADS)

/// Each thread: one row of the weight.
KERNEL(dora_gain, DoraGain, GLM_DORA_THREADS) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.n) {
        return;
    }
    float square = p.squares[i];
    for (uint32_t j = 0; j < p.r; j++) {
        const uint64_t at = uint64_t(i) * p.r + j;
        square += p.b[at] * (2.0f * p.s * p.p[uint64_t(j) * p.n + i] + p.s * p.s * p.q[at]);
    }
    const float inverse = 1.0f / sqrtf(square);
    p.inverse[i] = inverse;
    p.gain[i] = p.magnitude[i] * inverse;
}

/// Each block: row x, a strip of its columns; a thread 16 bytes of it.
template <typename T> DEVICE void scale_columns(const ScaleColumns &p) {
    constexpr int N = Vec<T>::N;
    const uint32_t column = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (column >= p.n) {
        return;
    }
    const uint64_t at = uint64_t(blockIdx.x) * p.n + column;
    const uint32_t left = p.n - column;
    by_access(aligned_16(p.x, p.y, p.gain, p.bias, p.residual, p.n * sizeof(T)), [&](auto access) {
        float values[N], gain[N];
        access.load(values, static_cast<const T *>(p.x) + at, left);
        access.load(gain, p.gain + column, left);
        UNROLL
        for (int i = 0; i < N; i++) {
            values[i] *= gain[i] + p.shift;
        }
        if (p.bias != nullptr) {
            access.load(gain, p.bias + column, left);
            UNROLL
            for (int i = 0; i < N; i++) {
                values[i] += gain[i];
            }
        }
        if (p.residual != nullptr) {
            access.load(gain, static_cast<const T *>(p.residual) + at, left);
            UNROLL
            for (int i = 0; i < N; i++) {
                values[i] += p.alpha * gain[i];
            }
        }
        if (p.accumulate) {
            access.load(gain, static_cast<const T *>(p.y) + at, left);
            UNROLL
            for (int i = 0; i < N; i++) {
                values[i] += gain[i];
            }
        }
        access.store(static_cast<T *>(p.y) + at, values, left);
    });
}
// static: scale_columns expect=load16
KERNELS_FOR_TYPES(scale_columns, ScaleColumns, GLM_DORA_THREADS)
