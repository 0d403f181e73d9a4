/// Products of dense matrices in float32, without tensor cores: they would round the factors to 10 bits.
///
/// A block of 128 threads has a tile of 64 x 64 of c, a thread 8 x 4 of it. Slices of 16 of k go through
/// registers into two stages of shared memory, both operands with k as the row: a warp then reads 8 values
/// that all its lanes share or that two halves share, and 4 per lane side by side. Tiles and parts of K are
/// numbered as in gemm.cuh.
#include "int8.cuh"

namespace {

constexpr int TILE = GLM_GEMM_SMALL_TILE;
constexpr int DEPTH = 16;
constexpr int STRIDE = TILE + 4; // rows begin 4 banks apart, still aligned to 16 bytes
constexpr int STAGE = 2 * DEPTH * STRIDE;
static_assert(2 * STAGE * 4 == GLM_GEMM_F32_SHARED_BYTES, "launched with other shared memory");
static_assert(GLM_GEMM_SMALL_DEPTH % DEPTH == 0, "parts of K begin at slices");

/// A thread's eight elements of an operand's tile, on their way from global to shared memory. S: float, or int8_t with a
/// scale for each row of the matrix as it lies in memory.
template <typename S, Inner INNER> struct Slice {
    const S *matrix;
    const float *scales;
    int extent, k, start;
    bool wide;
    float values[2][4];

    DEVICE Slice(const void *matrix, const float *scales, int extent, int k, int start)
        : matrix(static_cast<const S *>(matrix)), scales(scales), extent(extent), k(k), start(start) {
        int columns = INNER == Inner::K ? k : extent;
        wide = columns % 4 == 0 && reinterpret_cast<uintptr_t>(matrix) % (4 * sizeof(S)) == 0;
    }

    /// Position of four elements of the tile: (index along the extent, index along k) of the first.
    static DEVICE void position(int i, int &along_extent, int &along_k) {
        int quad = threadIdx.x + i * GLM_GEMM_THREADS;
        if (INNER == Inner::K) {
            along_extent = quad / (DEPTH / 4);
            along_k = quad % (DEPTH / 4) * 4;
        } else {
            along_extent = quad % (TILE / 4) * 4;
            along_k = quad / (TILE / 4);
        }
    }

    DEVICE void fetch(int from_k) {
        UNROLL
        for (int i = 0; i < 2; ++i) {
            int e, d;
            position(i, e, d);
            e += start;
            d += from_k;
            bool inside = e < extent && d < k;
            const S *from = matrix + (INNER == Inner::K ? int64_t(e) * k + d : int64_t(d) * extent + e);
            if constexpr (sizeof(S) == 1) {
                int left = INNER == Inner::K ? k - d : extent - e;
                load_codes(values[i], from, wide, inside ? left : 0);
                float scale = inside ? scales[INNER == Inner::K ? e : d] : 0.0f;
                UNROLL
                for (int j = 0; j < 4; ++j) values[i][j] *= scale;
            } else if (wide) {
                U128 v{0, 0, 0, 0};
                if (inside) v = load_16(from);
                values[i][0] = __uint_as_float(v.x);
                values[i][1] = __uint_as_float(v.y);
                values[i][2] = __uint_as_float(v.z);
                values[i][3] = __uint_as_float(v.w);
            } else {
                int left = INNER == Inner::K ? k - d : extent - e;
                UNROLL
                for (int j = 0; j < 4; ++j) values[i][j] = inside && j < left ? from[j] : 0.0f;
            }
        }
    }

    DEVICE void put(float *tile) const {
        UNROLL
        for (int i = 0; i < 2; ++i) {
            int e, d;
            position(i, e, d);
            UNROLL
            for (int j = 0; j < 4; ++j) {
                tile[INNER == Inner::K ? (d + j) * STRIDE + e : d * STRIDE + e + j] = values[i][j];
            }
        }
    }
};

template <typename SB, Inner INNER_A, Inner INNER_B> DEVICE void multiply_f32(const Gemm &p) {
    SHARED_MEMORY(float, stages);
    TileOfC tile = tile_of_c<TILE, TILE>(p);
    PartOfK part = part_of_k<GLM_GEMM_SMALL_DEPTH>(p);
    int begin = part.begin * GLM_GEMM_SMALL_DEPTH, end = min(part.end * GLM_GEMM_SMALL_DEPTH, p.k);
    int first_row = threadIdx.x / (TILE / 4) * 8, first_column = threadIdx.x % (TILE / 4) * 4;

    Slice<float, INNER_A> a(p.a, nullptr, p.m, p.k, tile.m);
    Slice<SB, INNER_B> b(p.b, p.scales, p.n, p.k, tile.n);
    float sums[8][4] = {};
    if (begin < end) {
        a.fetch(begin);
        b.fetch(begin);
        a.put(stages);
        b.put(stages + DEPTH * STRIDE);
    }
    __syncthreads();
    _Pragma("unroll 1")
    for (int k = begin, stage = 0; k < end; k += DEPTH, stage ^= 1) {
        bool more = k + DEPTH < end;
        if (more) {
            a.fetch(k + DEPTH);
            b.fetch(k + DEPTH);
        }
        const float *rows_a = stages + stage * STAGE + first_row;
        const float *rows_b = stages + stage * STAGE + DEPTH * STRIDE + first_column;
        UNROLL
        for (int d = 0; d < DEPTH; ++d) {
            Vec<float> low = Vec<float>::load(rows_a + d * STRIDE);
            Vec<float> high = Vec<float>::load(rows_a + d * STRIDE + 4);
            Vec<float> columns = Vec<float>::load(rows_b + d * STRIDE);
            UNROLL
            for (int j = 0; j < 4; ++j) {
                UNROLL
                for (int i = 0; i < 4; ++i) {
                    sums[i][j] += low.get(i) * columns.get(j);
                    sums[i + 4][j] += high.get(i) * columns.get(j);
                }
            }
        }
        if (more) {
            a.put(stages + (stage ^ 1) * STAGE);
            b.put(stages + (stage ^ 1) * STAGE + DEPTH * STRIDE);
        }
        __syncthreads();
    }

    Output<float> output = p.splits == 1 ? output_of<float>(p) : partial_of(p);
    bool wide = output.wide(p.n);
    int column = tile.n + first_column;
    UNROLL
    for (int i = 0; i < 8; ++i) {
        int row = tile.m + first_row + i;
        if (row >= p.m || column >= p.n) continue;
        int64_t at = int64_t(row) * output.stride + column;
        if (wide) {
            output.many(sums[i], at, column);
        } else {
            UNROLL
            for (int j = 0; j < 4; ++j) {
                if (column + j < p.n) output.one(sums[i][j], at + j, column + j);
            }
        }
    }
}

} // namespace

// static: gemm_nt_f32 threads=128 shared=17408 expect=load16
KERNEL(gemm_nt_f32, Gemm, GLM_GEMM_THREADS) { multiply_f32<float, Inner::K, Inner::K>(p); }
// static: gemm_nn_f32 threads=128 shared=17408 expect=load16
KERNEL(gemm_nn_f32, Gemm, GLM_GEMM_THREADS) { multiply_f32<float, Inner::K, Inner::EXTENT>(p); }
// static: gemm_tn_f32 threads=128 shared=17408 expect=load16
KERNEL(gemm_tn_f32, Gemm, GLM_GEMM_THREADS) { multiply_f32<float, Inner::EXTENT, Inner::EXTENT>(p); }
// static: gemm_nt_i_f32 threads=128 shared=17408
KERNEL(gemm_nt_i_f32, Gemm, GLM_GEMM_THREADS) { multiply_f32<int8_t, Inner::K, Inner::K>(p); }
// static: gemm_nn_i_f32 threads=128 shared=17408
KERNEL(gemm_nn_i_f32, Gemm, GLM_GEMM_THREADS) { multiply_f32<int8_t, Inner::K, Inner::EXTENT>(p); }
