/// Rows of matrices by number: embeddings and labelled rows.
#include "compat.cuh"
#include "kernels.h"
#include "span.cuh"
#include "types.cuh"

/// Each block: row x of the output, a strip of its columns; a thread 16 bytes of it. From an x of elements S.
template <typename T, typename S> DEVICE void gather(const GatherRows &p) {
    constexpr int N = Vec<T>::N;
    const uint32_t column = (blockIdx.y * blockDim.x + threadIdx.x) * N, row = blockIdx.x;
    if (column >= p.n) {
        return;
    }
    const int32_t from = p.rows[row];
    const bool inside = from >= 0 && uint32_t(from) < p.m;
    by_access(aligned_16(p.x, p.y, p.n * sizeof(T)), [&](auto access) {
        float values[N];
        const S *x = static_cast<const S *>(p.x) + uint64_t(inside ? from : 0) * p.n + column;
        access.load(values, x, inside ? p.n - column : 0);
        UNROLL
        for (int i = 0; i < N; i++) {
            values[i] = inside ? values[i] : NOT_A_NUMBER;
        }
        access.store(static_cast<T *>(p.y) + uint64_t(row) * p.n + column, values, p.n - column);
    });
}
template <typename T> DEVICE void gather_rows(const GatherRows &p) { gather<T, T>(p); }
// static: gather_rows shared=32 expect=load16
KERNELS_FOR_TYPES(gather_rows, GatherRows, GLM_ROWS_THREADS)
// static: gather_rounded_* shared=32 expect=load16
KERNEL(gather_rounded_f16, GatherRows, GLM_ROWS_THREADS) { gather<half_t, float>(p); }
#if GLM_HAS_BF16
KERNEL(gather_rounded_bf16, GatherRows, GLM_ROWS_THREADS) { gather<bf16_t, float>(p); }
#endif

/// Each block: row x of the output, a strip of its columns. All threads look for the row among the numbers, so that no
/// element is written twice and no pass of zeros comes first. Shared memory: one word for each warp.
template <typename T> DEVICE void scatter_rows(const ScatterRows &p) {
    constexpr int N = Vec<T>::N;
    constexpr int32_t NOWHERE = -1, OUTSIDE = 0x7fffffff;
    SHARED_MEMORY(int32_t, warps);
    const uint32_t row = blockIdx.x;
    int32_t from = NOWHERE;
    for (uint32_t r = threadIdx.x; r < p.r; r += blockDim.x) {
        const int32_t to = p.rows[r];
        if (to < 0 || uint32_t(to) >= p.m) {
            from = OUTSIDE;
        } else if (uint32_t(to) == row) {
            from = max(from, int32_t(r));
        }
    }
    UNROLL
    for (int distance = 16; distance > 0; distance /= 2) {
        from = max(from, __shfl_xor_sync(0xffffffffu, from, distance));
    }
    if (threadIdx.x % 32 == 0) {
        warps[threadIdx.x / 32] = from;
    }
    __syncthreads();
    for (uint32_t warp = 0; warp < blockDim.x / 32; warp++) {
        from = max(from, warps[warp]);
    }
    const uint32_t column = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (column >= p.n) {
        return;
    }
    const bool found = from != NOWHERE && from != OUTSIDE;
    by_access(aligned_16(p.x, p.y, p.n * sizeof(T)), [&](auto access) {
        float values[N];
        access.load(values, p.x + uint64_t(found ? from : 0) * p.n + column, found ? p.n - column : 0);
        UNROLL
        for (int i = 0; i < N; i++) {
            values[i] = from == OUTSIDE ? NOT_A_NUMBER : values[i];
        }
        access.store(static_cast<T *>(p.y) + uint64_t(row) * p.n + column, values, p.n - column);
    });
}
// static: scatter_rows shared=32 expect=load16
KERNELS_FOR_TYPES(scatter_rows, ScatterRows, GLM_ROWS_THREADS)

/// Each block: the id of row x of `dy`, if no earlier row has it, and a strip of columns. The block finds the later rows
/// of that id and adds them in order; a gradient's element is read and written once, by one thread.
/// Shared memory: one word for each warp.
template <typename T> DEVICE void embedding_backward(const EmbeddingBackward &p) {
    constexpr int N = Vec<T>::N;
    SHARED_MEMORY(uint32_t, warps);
    const uint32_t own = blockIdx.x;
    const int32_t id = p.ids[own];
    if (id < 0 || uint32_t(id) >= p.v) {
        return;
    }
    by_access(aligned_16(p.dw, p.dy, p.n * sizeof(T)), [&](auto access) {
        const uint32_t column = (blockIdx.y * blockDim.x + threadIdx.x) * N;
        const uint32_t left = column < p.n ? p.n - column : 0;
        float *dw = p.dw + uint64_t(id) * p.n + column;
        float sums[N] = {};
        for (uint32_t base = 0; base < p.m; base += blockDim.x) {
            const uint32_t row = base + threadIdx.x;
            const uint32_t same = __ballot_sync(0xffffffffu, row < p.m && p.ids[row] == id);
            if (threadIdx.x % 32 == 0) {
                warps[threadIdx.x / 32] = same;
            }
            __syncthreads();
            for (uint32_t warp = 0; warp < blockDim.x / 32; warp++) {
                for (uint32_t rows = warps[warp]; rows != 0; rows &= rows - 1) {
                    const uint32_t found = base + warp * 32 + __ffs(rows) - 1;
                    if (found < own) {
                        return;
                    }
                    if (found == own) {
                        access.load(sums, dw, left);
                    }
                    float values[N];
                    access.load(values, static_cast<const T *>(p.dy) + uint64_t(found) * p.n + column, left);
                    UNROLL
                    for (int i = 0; i < N; i++) {
                        sums[i] += values[i];
                    }
                }
            }
            __syncthreads();
        }
        access.store(dw, sums, left);
    });
}
// static: embedding_backward shared=32 expect=load16
KERNELS_FOR_TYPES(embedding_backward, EmbeddingBackward, GLM_ROWS_THREADS)
