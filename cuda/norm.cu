/// LayerNorm (Ba et al. 2016) over the last axis, and sums over rows for the gradients of parameters.
#include "compat.cuh"
#include "kernels.h"
#include "reduce.cuh"
#include "span.cuh"
#include "types.cuh"

/// The columns of a row that one thread of the LayerNorm kernels owns: pieces of `WIDTH`, a block's width apart.
template <typename T> struct Pieces {
    static constexpr int WIDTH = Vec<T>::N;
    static constexpr int COUNT = GLM_NORM_HELD / WIDTH;

    static DEVICE uint32_t column(int piece) { return (piece * blockDim.x + threadIdx.x) * WIDTH; }
    /// How many columns there are from this one on.
    static DEVICE uint32_t left(uint32_t column, uint32_t n) { return column < n ? n - column : 0; }
};

/// Each block: one row, held in registers, so that the variance is taken around the mean without reading twice.
/// Shared memory: that of `block_sum`.
template <typename T> DEVICE void layer_norm_forward(const LayerNormForward &p) {
    using Own = Pieces<T>;
    SHARED_MEMORY(float, scratch);
    by_access(aligned_16(p.x, p.y, p.weight, p.bias, p.n * sizeof(T)), [&](auto access) {
        const uint64_t start = uint64_t(blockIdx.x) * p.n;
        const float inverse = 1.0f / float(p.n);
        float values[Own::COUNT][Own::WIDTH];
        UNROLL
        for (int piece = 0; piece < Own::COUNT; piece++) {
            const uint32_t column = Own::column(piece);
            access.load(values[piece], static_cast<const T *>(p.x) + start + column, Own::left(column, p.n));
        }
        float sum = 0.0f;
        UNROLL
        for (int piece = 0; piece < Own::COUNT; piece++) {
            UNROLL
            for (int i = 0; i < Own::WIDTH; i++) {
                sum += values[piece][i];
            }
        }
        const float mean = block_sum(sum, scratch) * inverse;
        float squares = 0.0f;
        UNROLL
        for (int piece = 0; piece < Own::COUNT; piece++) {
            UNROLL
            for (int i = 0; i < Own::WIDTH; i++) {
                const float centred = values[piece][i] - mean;
                squares += Own::column(piece) + i < p.n ? centred * centred : 0.0f;
            }
        }
        const float rstd = rsqrtf(block_sum(squares, scratch) * inverse + p.eps);
        if (threadIdx.x == 0) {
            p.stats[2 * uint64_t(blockIdx.x)] = mean;
            p.stats[2 * uint64_t(blockIdx.x) + 1] = rstd;
        }
        UNROLL
        for (int piece = 0; piece < Own::COUNT; piece++) {
            const uint32_t column = Own::column(piece), left = Own::left(column, p.n);
            float weight[Own::WIDTH], bias[Own::WIDTH];
            access.load(weight, p.weight + column, left);
            access.load(bias, p.bias + column, left);
            UNROLL
            for (int i = 0; i < Own::WIDTH; i++) {
                values[piece][i] = (values[piece][i] - mean) * rstd * weight[i] + bias[i];
            }
            access.store(static_cast<T *>(p.y) + start + column, values[piece], left);
        }
    });
}
// static: layer_norm_forward threads=256 shared=128 expect=load16
KERNELS_FOR_TYPES(layer_norm_forward, LayerNormForward, GLM_NORM_THREADS)

/// Each block: one row, held in registers. Shared memory: that of `block_sum`.
template <typename T> DEVICE void layer_norm_backward_input(const LayerNormBackwardInput &p) {
    using Own = Pieces<T>;
    SHARED_MEMORY(float, scratch);
    by_access(aligned_16(p.x, p.dy, p.dx, p.weight, p.n * sizeof(T)), [&](auto access) {
        const uint64_t start = uint64_t(blockIdx.x) * p.n;
        const float inverse = 1.0f / float(p.n);
        const float mean = p.stats[2 * uint64_t(blockIdx.x)], rstd = p.stats[2 * uint64_t(blockIdx.x) + 1];
        float g[Own::COUNT][Own::WIDTH], normal[Own::COUNT][Own::WIDTH];
        UNROLL
        for (int piece = 0; piece < Own::COUNT; piece++) {
            const uint32_t column = Own::column(piece), left = Own::left(column, p.n);
            access.load(normal[piece], static_cast<const T *>(p.x) + start + column, left);
            access.load(g[piece], static_cast<const T *>(p.dy) + start + column, left);
        }
        float sum_g = 0.0f, sum_gx = 0.0f;
        UNROLL
        for (int piece = 0; piece < Own::COUNT; piece++) {
            const uint32_t column = Own::column(piece);
            float weight[Own::WIDTH];
            access.load(weight, p.weight + column, Own::left(column, p.n));
            UNROLL
            for (int i = 0; i < Own::WIDTH; i++) {
                // Behind the row's end dy and the weight are 0, and so is what they add to the sums.
                g[piece][i] *= weight[i];
                normal[piece][i] = (normal[piece][i] - mean) * rstd;
                sum_g += g[piece][i];
                sum_gx += g[piece][i] * normal[piece][i];
            }
        }
        const float mean_g = block_sum(sum_g, scratch) * inverse;
        const float mean_gx = block_sum(sum_gx, scratch) * inverse;
        UNROLL
        for (int piece = 0; piece < Own::COUNT; piece++) {
            const uint32_t column = Own::column(piece);
            UNROLL
            for (int i = 0; i < Own::WIDTH; i++) {
                g[piece][i] = rstd * (g[piece][i] - mean_g - normal[piece][i] * mean_gx);
            }
            access.store(static_cast<T *>(p.dx) + start + column, g[piece], Own::left(column, p.n));
        }
    });
}
// static: layer_norm_backward_input threads=256 shared=128 expect=load16
KERNELS_FOR_TYPES(layer_norm_backward_input, LayerNormBackwardInput, GLM_NORM_THREADS)

/// Sums over the rows of one part, in a fixed order: a warp adds every eighth row, then the warps are added in order.
///
/// Block (x, y): a strip of `32 * Vec<T>::N` columns and part y of the rows. A lane owns one vector of columns;
/// `load(row, column, left, addends)` gives the addends of one row for each of `OUTPUTS` sums, zeros when `left` is 0.
/// Shared memory: `OUTPUTS * 32 * Vec<T>::N` floats for each warp.
template <typename T, int OUTPUTS, typename Load>
DEVICE void sum_rows(float *partials, uint32_t m, uint32_t n, uint32_t rows_per_part, Load load) {
    constexpr int N = Vec<T>::N, STRIP = 32 * N;
    constexpr int AHEAD = 4; // rows whose loads are in flight together
    SHARED_MEMORY(float, warps);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_count = blockDim.x / 32;
    const uint32_t column = blockIdx.x * STRIP + lane * N, left = column < n ? n - column : 0;
    const uint32_t first = blockIdx.y * rows_per_part, end = min(first + rows_per_part, m);
    float sums[OUTPUTS][N] = {};
    for (uint32_t row = first + warp; row < end; row += AHEAD * warp_count) {
        float addends[AHEAD][OUTPUTS][N];
        UNROLL
        for (int ahead = 0; ahead < AHEAD; ahead++) {
            const uint32_t at = row + ahead * warp_count;
            load(min(at, end - 1), column, at < end ? left : 0, addends[ahead]);
        }
        UNROLL
        for (int ahead = 0; ahead < AHEAD; ahead++) {
            UNROLL
            for (int output = 0; output < OUTPUTS; output++) {
                UNROLL
                for (int i = 0; i < N; i++) {
                    sums[output][i] += addends[ahead][output][i];
                }
            }
        }
    }
    // Element i of every lane lies together, so that neither this side nor the other meets a bank conflict.
    UNROLL
    for (int output = 0; output < OUTPUTS; output++) {
        UNROLL
        for (int i = 0; i < N; i++) {
            warps[((warp * OUTPUTS + output) * N + i) * 32 + lane] = sums[output][i];
        }
    }
    __syncthreads();
    for (uint32_t at = threadIdx.x; at < OUTPUTS * STRIP; at += blockDim.x) {
        const uint32_t output = at / STRIP, i = at % STRIP / 32, to = blockIdx.x * STRIP + at % 32 * N + i;
        float sum = 0.0f;
        for (uint32_t from = 0; from < warp_count; from++) {
            sum += warps[from * OUTPUTS * STRIP + at];
        }
        if (to < n) {
            partials[(uint64_t(blockIdx.y) * OUTPUTS + output) * n + to] = sum;
        }
    }
}

/// As [`sum_rows`].
template <typename T> DEVICE void layer_norm_backward_parameters(const LayerNormBackwardParameters &p) {
    constexpr int N = Vec<T>::N;
    by_access(aligned_16(p.x, p.dy, p.n * sizeof(T)), [&](auto access) {
        auto load = [&](uint32_t row, uint32_t column, uint32_t left, float (&addends)[2][N]) {
            const uint64_t at = uint64_t(row) * p.n + column;
            const float mean = p.stats[2 * uint64_t(row)], rstd = p.stats[2 * uint64_t(row) + 1];
            float x[N];
            access.load(x, static_cast<const T *>(p.x) + at, left);
            access.load(addends[1], static_cast<const T *>(p.dy) + at, left);
            UNROLL
            for (int i = 0; i < N; i++) {
                addends[0][i] = addends[1][i] * ((x[i] - mean) * rstd);
            }
        };
        sum_rows<T, 2>(p.partials, p.m, p.n, p.rows_per_part, load);
    });
}
// static: layer_norm_backward_parameters shared=16384 expect=load16
// static: layer_norm_backward_parameters_f32 shared=8192 expect=load16
KERNELS_FOR_TYPES(layer_norm_backward_parameters, LayerNormBackwardParameters, GLM_COLUMN_THREADS)

/// As [`sum_rows`].
template <typename T> DEVICE void column_sums(const ColumnSums &p) {
    constexpr int N = Vec<T>::N;
    by_access(aligned_16(p.dy, p.n * sizeof(T)), [&](auto access) {
        auto load = [&](uint32_t row, uint32_t column, uint32_t left, float (&addends)[1][N]) {
            access.load(addends[0], static_cast<const T *>(p.dy) + uint64_t(row) * p.n + column, left);
        };
        sum_rows<T, 1>(p.partials, p.m, p.n, p.rows_per_part, load);
    });
}
// static: column_sums shared=8192 expect=load16
// static: column_sums_f32 shared=4096 expect=load16
KERNELS_FOR_TYPES(column_sums, ColumnSums, GLM_COLUMN_THREADS)

/// As [`sum_rows`].
template <typename T> DEVICE void column_products(const ColumnProducts &p) {
    constexpr int N = Vec<T>::N;
    by_access(aligned_16(p.x, p.y, p.factor, p.n * sizeof(T)), [&](auto access) {
        auto load = [&](uint32_t row, uint32_t column, uint32_t left, float (&addends)[1][N]) {
            const uint64_t at = uint64_t(row) * p.n + column;
            float y[N], factor[N];
            access.load(addends[0], static_cast<const T *>(p.x) + at, left);
            access.load(y, static_cast<const T *>(p.y) + at, left);
            access.load(factor, p.factor + column, left);
            UNROLL
            for (int i = 0; i < N; i++) {
                addends[0][i] *= y[i] * factor[i];
            }
        };
        sum_rows<T, 1>(p.partials, p.m, p.n, p.rows_per_part, load);
    });
}
// static: column_products shared=8192 expect=load16
// static: column_products_f32 shared=4096 expect=load16
KERNELS_FOR_TYPES(column_products, ColumnProducts, GLM_COLUMN_THREADS)

/// Each thread: one column of the output number `blockIdx.y`.
KERNEL(add_partials, AddPartials, GLM_COLUMN_THREADS) {
    const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.n) {
        return;
    }
    float *output = blockIdx.y == 0 ? p.first : p.second;
    float sum = 0.0f;
    for (uint32_t part = 0; part < p.parts; part++) {
        sum += p.partials[(uint64_t(part) * gridDim.y + blockIdx.y) * p.n + column];
    }
    output[column] += sum;
}
