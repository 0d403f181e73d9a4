/// A tile of `c = alpha * op(a) op(b) + ...` per block, by tensor cores: global memory -> shared memory in
/// several stages -> fragments -> mma. The parts: an operand's tile in shared memory, its loader, fragments,
/// the main loop, the way out.
#ifndef GLM_GEMM_CUH
#define GLM_GEMM_CUH

#include "compat.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "types.cuh"

/// Which index of an operand lies contiguous in memory: that of the sum (k), or the one that it shares with c
/// (m or n).
enum class Inner { K, EXTENT };

#ifdef GLM_SM75
constexpr int GEMM_STAGES = 2;
constexpr int GEMM_SHARED_BYTES = GLM_GEMM_SHARED_BYTES_SM75;
#else
constexpr int GEMM_STAGES = 3;
constexpr int GEMM_SHARED_BYTES = GLM_GEMM_SHARED_BYTES;
#endif

/// What a block computes: EXTENT_M x EXTENT_N of c, DEPTH of k per stage, by WARPS_M x WARPS_N warps.
template <int EXTENT_M, int EXTENT_N, int DEPTH_, int WARPS_M_, int WARPS_N_> struct Tiling {
    static constexpr int M = EXTENT_M;
    static constexpr int N = EXTENT_N;
    static constexpr int DEPTH = DEPTH_;
    static constexpr int WARPS_M = WARPS_M_;
    static constexpr int WARPS_N = WARPS_N_;
    static constexpr int WARP_M = M / WARPS_M;
    static constexpr int WARP_N = N / WARPS_N;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int STAGES = GEMM_STAGES;
    static_assert(THREADS == GLM_GEMM_THREADS, "launched with another number of threads");
    static_assert(STAGES * (M + N) * DEPTH * 2 <= GEMM_SHARED_BYTES, "launched with less shared memory");
    static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && DEPTH % 16 == 0, "fragments are 16 x 16");
};

/// Two blocks on an SM of 100 KiB: 4 warps of 64 x 64 each, whose fragments are used 4 and 8 times.
using LargeTiling = Tiling<GLM_GEMM_TILE, GLM_GEMM_TILE, 32, 2, 2>;
/// For few rows or columns: as much memory in flight, four times the blocks.
using SmallTiling = Tiling<GLM_GEMM_SMALL_TILE, GLM_GEMM_SMALL_TILE, GLM_GEMM_SMALL_DEPTH, 2, 2>;

/// `EXTENT` rows or columns of an operand by `DEPTH` of k in shared memory, laid as in global memory: ROWS of
/// COLUMNS.
///
/// Chunks of 16 bytes are exchanged within a row so that the eight rows of an ldmatrix tile lie in different
/// banks.
template <Inner INNER, int EXTENT, int DEPTH> struct SharedTile {
    static constexpr int ROWS = INNER == Inner::K ? EXTENT : DEPTH;
    static constexpr int COLUMNS = INNER == Inner::K ? DEPTH : EXTENT;
    static constexpr int CHUNKS = COLUMNS / 8;
    static constexpr int ELEMENTS = ROWS * COLUMNS;
    static_assert(CHUNKS >= 4 && (CHUNKS & (CHUNKS - 1)) == 0, "a row is 64, 128 or 256 bytes");

    /// Where chunk `chunk` of row `row` begins, in elements.
    static DEVICE int offset(int row, int chunk) {
        int turn = CHUNKS >= 8 ? row % 8 : row / 2 % 4;
        return row * COLUMNS + (chunk ^ turn) * 8;
    }
};

/// Brings the tiles of one operand, elements S in global memory, to shared memory as elements T.
///
/// Each thread has COUNT chunks, one under the other. Elements outside the matrix become 0. The matrix is
/// read 16 bytes at a time if its rows begin at multiples of that, else element by element.
template <typename T, typename S, Inner INNER, int EXTENT, int DEPTH, int THREADS> struct Loader {
    using Tile = SharedTile<INNER, EXTENT, DEPTH>;
    static constexpr bool CONVERTS = sizeof(S) != sizeof(T);
    static constexpr int STEP = THREADS / Tile::CHUNKS;
    static constexpr int COUNT = Tile::ROWS / STEP;
    static_assert(STEP % 8 == 0 && COUNT * STEP == Tile::ROWS, "one swizzle serves all chunks of a thread");

    const S *first; // this thread's first chunk in the tile at k = 0
    int row, column;
    int rows, columns;
    int place;
    bool wide;
    float staged[CONVERTS ? COUNT * 8 : 1]; // elements on their way, when they are converted

    /// `extent` is that of the matrix beside `k`; `start` is where the block's tile begins in it. Only codes (int8.cuh) have
    /// scales.
    DEVICE Loader(const void *matrix, const float * /* scales */, int extent, int k, int start) {
        row = threadIdx.x / Tile::CHUNKS;
        int chunk = threadIdx.x % Tile::CHUNKS;
        column = chunk * 8;
        place = Tile::offset(row, chunk);
        (INNER == Inner::K ? row : column) += start;
        rows = INNER == Inner::K ? extent : k;
        columns = INNER == Inner::K ? k : extent;
        first = static_cast<const S *>(matrix) + int64_t(row) * columns + column;
        wide = columns * sizeof(S) % 16 == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0;
    }

    /// Begins to bring the tile at `k` to `tile`.
    DEVICE void fetch(T *tile, int k) {
        const S *from = first + (INNER == Inner::K ? int64_t(k) : int64_t(k) * columns);
        int r = row + (INNER == Inner::K ? 0 : k);
        int c = column + (INNER == Inner::K ? k : 0);
        if constexpr (CONVERTS) {
            UNROLL
            for (int i = 0; i < COUNT; ++i) {
                fetch_chunk(staged + 8 * i, from + int64_t(i * STEP) * columns, r + i * STEP < rows, c);
            }
        } else if (wide) {
            UNROLL
            for (int i = 0; i < COUNT; ++i) {
                cp_async_16(tile + place + i * STEP * Tile::COLUMNS, from + int64_t(i * STEP) * columns,
                            r + i * STEP < rows && c < columns);
            }
        } else {
            _Pragma("unroll 1")
            for (int i = 0; i < COUNT; ++i) {
                copy_chunk(tile + place + i * STEP * Tile::COLUMNS, from + int64_t(i * STEP) * columns,
                           r + i * STEP < rows, c);
            }
        }
    }

    /// Ends what fetch began, except for copies that are still under way.
    DEVICE void put(T *tile) {
        if constexpr (CONVERTS) {
            UNROLL
            for (int i = 0; i < COUNT; ++i) {
                const float *v = staged + 8 * i;
                store_16(tile + place + i * STEP * Tile::COLUMNS,
                         U128{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]),
                              pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7])});
            }
        }
    }

  private:
    DEVICE void fetch_chunk(float *to, const float *from, bool valid, int c) const {
        if (wide) {
            UNROLL
            for (int half = 0; half < 2; ++half) {
                U128 v{0, 0, 0, 0};
                if (valid && c + 4 * half < columns) v = load_16(from + 4 * half);
                to[4 * half] = __uint_as_float(v.x);
                to[4 * half + 1] = __uint_as_float(v.y);
                to[4 * half + 2] = __uint_as_float(v.z);
                to[4 * half + 3] = __uint_as_float(v.w);
            }
        } else {
            UNROLL
            for (int e = 0; e < 8; ++e) to[e] = valid && c + e < columns ? from[e] : 0.0f;
        }
    }

    DEVICE void copy_chunk(T *to, const S *from, bool valid, int c) const {
        uint32_t words[4];
        UNROLL
        for (int i = 0; i < 4; ++i) {
            uint32_t low = valid && c + 2 * i < columns ? from[2 * i].bits : 0;
            uint32_t high = valid && c + 2 * i + 1 < columns ? from[2 * i + 1].bits : 0;
            words[i] = low | high << 16;
        }
        store_16(to, U128{words[0], words[1], words[2], words[3]});
    }
};

/// The fragment of 16 rows from `m` and 16 of k from `k` of the tile of a.
template <Inner INNER, int EXTENT, int DEPTH, typename T>
DEVICE void fragment_a(uint32_t (&f)[4], const T *tile, int m, int k) {
    using Tile = SharedTile<INNER, EXTENT, DEPTH>;
    int lane = threadIdx.x % 32;
    if (INNER == Inner::K) {
        ldmatrix_x4(f, tile + Tile::offset(m + lane % 16, k / 8 + lane / 16));
    } else {
        ldmatrix_x4_trans(f, tile + Tile::offset(k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2));
    }
}

/// The fragments of 16 of k from `k` and twice 8 columns from `n` of the tile of b: f[0], f[1] and f[2],
/// f[3].
template <Inner INNER, int EXTENT, int DEPTH, typename T>
DEVICE void fragment_b(uint32_t (&f)[4], const T *tile, int n, int k) {
    using Tile = SharedTile<INNER, EXTENT, DEPTH>;
    int lane = threadIdx.x % 32;
    if (INNER == Inner::K) {
        ldmatrix_x4(f, tile + Tile::offset(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
    } else {
        ldmatrix_x4_trans(f, tile + Tile::offset(k + lane % 16, n / 8 + lane / 16));
    }
}

/// A warp's part of c.
template <typename W> struct Accumulators {
    float values[W::WARP_M / 16][W::WARP_N / 8][4];
};

/// Multiplies the tiles of one stage.
template <typename W, Inner INNER_A, Inner INNER_B, typename T>
DEVICE void multiply_stage(Accumulators<W> &sums, const T *tile_a, const T *tile_b, int warp_m, int warp_n) {
    UNROLL
    for (int k = 0; k < W::DEPTH; k += 16) {
        uint32_t a[W::WARP_M / 16][4];
        uint32_t b[W::WARP_N / 16][4];
        UNROLL
        for (int i = 0; i < W::WARP_M / 16; ++i) {
            fragment_a<INNER_A, W::M, W::DEPTH>(a[i], tile_a, warp_m + 16 * i, k);
        }
        UNROLL
        for (int j = 0; j < W::WARP_N / 16; ++j) {
            fragment_b<INNER_B, W::N, W::DEPTH>(b[j], tile_b, warp_n + 16 * j, k);
        }
        UNROLL
        for (int i = 0; i < W::WARP_M / 16; ++i) {
            UNROLL
            for (int j = 0; j < W::WARP_N / 16; ++j) {
                mma_16x8x16<T>(sums.values[i][2 * j], a[i], {b[j][0], b[j][1]});
                mma_16x8x16<T>(sums.values[i][2 * j + 1], a[i], {b[j][2], b[j][3]});
            }
        }
    }
}

/// Where a value goes and what is added to it.
template <typename C> struct Output {
    C *c;
    const float *bias;
    const C *residual;
    int stride; // from row to row of c and of the residual
    float alpha, beta, gamma;

    /// Do rows of c begin at multiples of 16 bytes, and do their `columns` end there?
    DEVICE bool wide(int columns) const {
        return columns % Vec<C>::N == 0 && stride % Vec<C>::N == 0 &&
               reinterpret_cast<uintptr_t>(c) % 16 == 0 && reinterpret_cast<uintptr_t>(residual) % 16 == 0;
    }

    /// Finishes the sum `v` of element `at`, in column `column`.
    DEVICE void one(float v, int64_t at, int column) const {
        v *= alpha;
        if (beta != 0.0f) v += beta * to_float(c[at]);
        if (bias) v += bias[column];
        if (residual) v += gamma * to_float(residual[at]);
        c[at] = from_float<C>(v);
    }
    /// Finishes those of 16 bytes of c that are aligned to as many.
    DEVICE void many(float (&v)[Vec<C>::N], int64_t at, int column) const {
        constexpr int COUNT = Vec<C>::N;
        UNROLL
        for (int e = 0; e < COUNT; ++e) v[e] *= alpha;
        if (beta != 0.0f) {
            Vec<C> old = Vec<C>::load(c + at);
            UNROLL
            for (int e = 0; e < COUNT; ++e) v[e] += beta * old.get(e);
        }
        if (bias) {
            UNROLL
            for (int e = 0; e < COUNT; ++e) v[e] += bias[column + e];
        }
        if (residual) {
            Vec<C> r = Vec<C>::load(residual + at);
            UNROLL
            for (int e = 0; e < COUNT; ++e) v[e] += gamma * r.get(e);
        }
        Vec<C> out;
        UNROLL
        for (int e = 0; e < COUNT; ++e) out.set(e, v[e]);
        out.store(c + at);
    }
};

template <typename C> DEVICE Output<C> output_of(const Gemm &p) {
    const C *residual = static_cast<const C *>(p.residual);
    return Output<C>{static_cast<C *>(p.c), p.bias, residual, p.stride, p.alpha, p.beta, p.gamma};
}

/// Where the bare sums of the block's part of K go.
DEVICE Output<float> partial_of(const Gemm &p) {
    float *partial = p.partial + int64_t(blockIdx.y) * p.m * p.n;
    return Output<float>{partial, nullptr, nullptr, p.n, 1.0f, 0.0f, 0.0f};
}

/// Writes a warp's part of c, whose first element is (m, n) of the matrix.
///
/// Fragments scatter two columns per lane over eight rows; through shared memory, 16 rows at a time, they
/// become 16 bytes per lane side by side. `slab` is the warp's own: 16 rows of WARP_N floats and 8 more,
/// which keeps rows in other banks.
template <typename W, typename C>
DEVICE void write_out(const Accumulators<W> &sums, const Output<C> &output, float *slab, int m, int n,
                      int rows, int columns) {
    constexpr int STRIDE = W::WARP_N + 8;
    constexpr int WIDTH = Vec<C>::N;
    constexpr int LANES = W::WARP_N / WIDTH; // per row
    int lane = threadIdx.x % 32;
    bool wide = output.wide(columns);
    UNROLL
    for (int i = 0; i < W::WARP_M / 16; ++i) {
        float *mine = slab + lane / 4 * STRIDE + lane % 4 * 2;
        UNROLL
        for (int j = 0; j < W::WARP_N / 8; ++j) {
            const float(&v)[4] = sums.values[i][j];
            mine[8 * j] = v[0];
            mine[8 * j + 1] = v[1];
            mine[8 * STRIDE + 8 * j] = v[2];
            mine[8 * STRIDE + 8 * j + 1] = v[3];
        }
        __syncwarp();
        _Pragma("unroll 1")
        for (int r = lane / LANES; r < 16; r += 32 / LANES) {
            int row = m + 16 * i + r, column = n + lane % LANES * WIDTH;
            const float *from = slab + r * STRIDE + lane % LANES * WIDTH;
            int64_t at = int64_t(row) * output.stride + column;
            if (row >= rows || column >= columns) continue;
            if (wide) {
                float v[WIDTH];
                UNROLL
                for (int e = 0; e < WIDTH; ++e) v[e] = from[e];
                output.many(v, at, column);
            } else {
                _Pragma("unroll 1")
                for (int e = 0; e < WIDTH && column + e < columns; ++e) {
                    output.one(from[e], at + e, column + e);
                }
            }
        }
        __syncwarp();
    }
}

/// The first element of the block's tile of c.
///
/// Tiles are numbered in blockIdx.x, eight rows of tiles at a time, so that blocks that run together share
/// what they read.
struct TileOfC {
    int m, n;
};
template <int EXTENT_M, int EXTENT_N> DEVICE TileOfC tile_of_c(const Gemm &p) {
    constexpr int GROUP = 8;
    int tiles_m = (p.m + EXTENT_M - 1) / EXTENT_M, tiles_n = (p.n + EXTENT_N - 1) / EXTENT_N;
    int group = blockIdx.x / (GROUP * tiles_n), in_group = blockIdx.x % (GROUP * tiles_n);
    int height = min(tiles_m - group * GROUP, GROUP);
    return TileOfC{(group * GROUP + in_group % height) * EXTENT_M, in_group / height * EXTENT_N};
}

/// The block's part of K, that of blockIdx.y, in slices of DEPTH; the last parts may be empty.
struct PartOfK {
    int begin, end;
};
template <int DEPTH> DEVICE PartOfK part_of_k(const Gemm &p) {
    int slices = (p.k + DEPTH - 1) / DEPTH, part = (slices + p.splits - 1) / p.splits;
    int begin = blockIdx.y * part;
    return PartOfK{begin, min(begin + part, slices)};
}

/// One tile of c: a of type SA, b of type SB, c of type C, products of T.
///
/// Every warp has its own rectangle of the tile; one whose rectangle lies outside of c only loads.
template <typename W, typename T, typename SA, typename SB, typename C, Inner INNER_A, Inner INNER_B>
DEVICE void multiply(const Gemm &p) {
    using TileA = SharedTile<INNER_A, W::M, W::DEPTH>;
    using TileB = SharedTile<INNER_B, W::N, W::DEPTH>;
    constexpr int STAGE = TileA::ELEMENTS + TileB::ELEMENTS;
    SHARED_MEMORY(T, stages);

    TileOfC at = tile_of_c<W::M, W::N>(p);
    PartOfK part = part_of_k<W::DEPTH>(p);
    int warp = threadIdx.x / 32;
    int warp_m = warp / W::WARPS_N * W::WARP_M, warp_n = warp % W::WARPS_N * W::WARP_N;
    bool works = at.m + warp_m < p.m && at.n + warp_n < p.n;

    Loader<T, SA, INNER_A, W::M, W::DEPTH, W::THREADS> a(p.a, nullptr, p.m, p.k, at.m);
    Loader<T, SB, INNER_B, W::N, W::DEPTH, W::THREADS> b(p.b, p.scales, p.n, p.k, at.n);
    auto fetch = [&](int slice, int stage) {
        if (slice < part.end) {
            a.fetch(stages + stage * STAGE, slice * W::DEPTH);
            b.fetch(stages + stage * STAGE + TileA::ELEMENTS, slice * W::DEPTH);
        }
        cp_async_commit();
    };
    auto put = [&](int slice, int stage) {
        if (slice < part.end) {
            a.put(stages + stage * STAGE);
            b.put(stages + stage * STAGE + TileA::ELEMENTS);
        }
    };

    Accumulators<W> sums{};
    UNROLL
    for (int s = 0; s < W::STAGES - 1; ++s) {
        fetch(part.begin + s, s);
        put(part.begin + s, s);
    }
    int reading = 0, writing = W::STAGES - 1;
    _Pragma("unroll 1")
    for (int slice = part.begin; slice < part.end; ++slice) {
        cp_async_wait<W::STAGES - 2>();
        __syncthreads(); // this slice has arrived, and everyone is done with the stage written to next
        fetch(slice + W::STAGES - 1, writing);
        if (works) {
            const T *tile = stages + reading * STAGE;
            multiply_stage<W, INNER_A, INNER_B>(sums, tile, tile + TileA::ELEMENTS, warp_m, warp_n);
        }
        put(slice + W::STAGES - 1, writing);
        reading = reading + 1 == W::STAGES ? 0 : reading + 1;
        writing = writing + 1 == W::STAGES ? 0 : writing + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (!works) return;

    constexpr int SLAB = 16 * (W::WARP_N + 8);
    static_assert(SLAB * 4 * W::THREADS / 32 <= W::STAGES * STAGE * 2, "the way out reuses the stages");
    float *slab = reinterpret_cast<float *>(stages) + warp * SLAB;
    if (p.splits > 1) {
        write_out<W>(sums, partial_of(p), slab, at.m + warp_m, at.n + warp_n, p.m, p.n);
    } else {
        write_out<W>(sums, output_of<C>(p), slab, at.m + warp_m, at.n + warp_n, p.m, p.n);
    }
}

#endif
