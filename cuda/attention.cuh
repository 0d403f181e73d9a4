/// What the attention kernels share: which keys a query sees, tiles in shared memory, and their fragments.
///
/// A tile is ROWS x D elements of 16 bits. Everything below that takes a D is for the tensor cores.
#ifndef GLM_ATTENTION_CUH
#define GLM_ATTENTION_CUH

#include "compat.cuh"
#include "kernels.h"
#include "types.cuh"

/// log2 e: scores are kept in powers of two, as ex2 wants them.
constexpr float LOG2_E = 1.4426950408889634f;
/// ln 2.
constexpr float LN_2 = 0.6931471805599453f;

// --- Who sees whom ----------------------------------------------------------------------------------------------------

/// The keys [from, to) of its own sequence that a query sees; all with equal weights if `uniform`.
struct View {
    int from, to;
    bool uniform;
};

/// The mask of one sequence.
struct Mask {
    int start, context, keys;
    /// Is there a prefix? Then it is all that a padding query sees.
    bool prefixed;

    static DEVICE Mask load(const int32_t *spans, uint32_t sequence, uint32_t keys, uint32_t prefix) {
        return Mask{spans[2 * sequence], spans[2 * sequence + 1], int(keys), prefix > 0};
    }

    DEVICE View of(int position) const {
        if (position >= start) return View{start, min(max(context, position + 1), keys), false};
        return prefixed ? View{0, 0, false} : View{0, keys, true};
    }

    /// The keys that the queries at [first, end) see together. With `padding` off, those that carry a gradient to them.
    DEVICE View together(int first, int end, bool padding) const {
        if (padding && !prefixed && first < start) return View{0, keys, true};
        if (end <= start) return View{0, 0, false};
        return View{start, min(max(context, end), keys), false};
    }

    /// The keys that each query from `first` on sees.
    DEVICE View each(int first) const {
        // Without a choice of `from`: one register less in the loop over tiles.
        return View{start, first < start ? 0 : min(max(context, first + 1), keys), false};
    }
};

/// The tiles of queries that a tile of keys gives to: [0, padding), then [first, end).
struct QueryTiles {
    int padding, first, end;

    /// Those of a sequence with as many queries as keys, in tiles of `rows`, for the keys [key, key_end).
    static DEVICE QueryTiles of(const Mask &mask, int key, int key_end, int rows) {
        QueryTiles tiles;
        tiles.end = (mask.keys + rows - 1) / rows;
        tiles.first = key_end <= mask.start ? tiles.end : (key < mask.context ? mask.start : max(key, mask.start)) / rows;
        tiles.padding = mask.prefixed ? 0 : min((mask.start + rows - 1) / rows, tiles.end);
        return tiles;
    }

    DEVICE int begin() const { return padding > 0 ? 0 : first; }
    /// The tile after tile i; end or more if there is none.
    DEVICE int next(int i) const { return i + 1 == padding ? max(padding, first) : i + 1; }
};

/// Where the prefix of a head begins. Sequences have one each, or all the same: a stride of 0.
template <typename P> DEVICE uint64_t prefix_start(const P &p, uint32_t sequence, uint32_t head, uint32_t d) {
    return sequence * p.prefix_batch_stride + uint64_t(head) * p.prefix * d;
}

// --- Tiles ------------------------------------------------------------------------------------------------------------

/// Where a row's 16-byte chunk stands in a tile of D columns. Chunks are permuted within 128-byte lines so that the 8
/// rows that ldmatrix takes of one column of chunks stand in 8 different groups of banks.
template <int D> DEVICE int tile_offset(int row, int chunk) {
    constexpr int CHUNKS = D / 8;
    constexpr int ROWS_IN_LINE = CHUNKS < 8 ? 8 / CHUNKS : 1;
    constexpr int PERMUTED = CHUNKS < 8 ? CHUNKS : 8;
    return row * D + ((chunk ^ (row / ROWS_IN_LINE % PERMUTED)) * 8);
}

/// Starts copying a tile of ROWS rows, `stride` elements apart, of which the first `valid` exist and the others are 0.
template <int D, int ROWS, typename T> DEVICE void load_tile(T *tile, const T *rows, uint32_t stride, int valid) {
    constexpr int THREADS = GLM_ATTENTION_THREADS, CHUNKS = D / 8, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && STEP % 8 == 0, "a thread's rows are permuted alike");
    int row = int(threadIdx.x / CHUNKS), chunk = int(threadIdx.x % CHUNKS);
    T *to = tile + tile_offset<D>(row, chunk);
    rows += row * stride + chunk * 8;
    UNROLL
    for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
        if (ROWS % STEP != 0 && row >= ROWS) break;
        cp_async_16(to, rows, row < valid);
        row += STEP;
        to += STEP * D;
        rows += STEP * stride;
    }
}

/// The other way, for the 16 rows of one warp, `valid` of which exist.
template <int D, typename T> DEVICE void store_rows(T *rows, uint32_t stride, const T *tile, int first, int valid) {
    constexpr int CHUNKS = D / 8;
    UNROLL
    for (int i = int(threadIdx.x % 32); i < 16 * CHUNKS; i += 32) {
        int row = first + i / CHUNKS, chunk = i % CHUNKS;
        if (row < valid) Vec<T>::load(tile + tile_offset<D>(row, chunk)).store(rows + row * stride + chunk * 8);
    }
}

// --- Fragments (maps: ptx.cuh) ----------------------------------------------------------------------------------------

/// From the place of a chunk among the first two of its row to the same chunk 2 `step` further on. An exclusive or with one
/// of 4 constants and an addition to fold into the instruction: fewer addresses to keep than from tile_offset.
DEVICE int step_offset(int offset, int step) { return (offset ^ (step % 4 * 16)) + step / 4 * 64; }

/// A: rows row to row + 15, columns 16 step to 16 step + 15 of a tile.
template <int D, typename T> DEVICE void load_a(uint32_t (&a)[4], const T *tile, int row, int step) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(a, tile + row * D + step_offset(tile_offset<D>(lane % 16, lane / 16), step));
}

/// Two B whose n are the tile's rows row to row + 7 and row + 8 to row + 15, and k its columns 16 step to 16 step + 15.
template <int D, typename T> DEVICE void load_b(uint32_t (&b)[4], const T *tile, int row, int step) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(b, tile + row * D + step_offset(tile_offset<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2), step));
}

/// Two B whose k are the tile's rows row to row + 15, and n its columns 16 step to 16 step + 7 and the next 8.
template <int D, typename T> DEVICE void load_b_trans(uint32_t (&b)[4], const T *tile, int row, int step) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(b, tile + row * D + step_offset(tile_offset<D>(lane % 16, lane / 16), step));
}

/// Two neighbouring 16x8 pieces of d += a b.
template <typename T> DEVICE void mma_pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
    mma_16x8x16<T>(d0, a, b0);
    mma_16x8x16<T>(d1, a, b1);
}

/// Two neighbouring 16x8 accumulators as A of the next product: their columns become its k.
template <typename T> DEVICE void pack_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack2<T>(left[0], left[1]);
    a[1] = pack2<T>(left[2], left[3]);
    a[2] = pack2<T>(right[0], right[1]);
    a[3] = pack2<T>(right[2], right[3]);
}

/// Rows row to row + 15 of a tile from accumulators, times `scale` by row (those of lane / 4 and 8 below).
template <int D, typename T>
DEVICE void store_accumulators(T *tile, int row, const float (&d)[D / 8][4], float upper, float lower) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL
    for (int n = 0; n < D / 8; n++) {
        uint32_t *up = reinterpret_cast<uint32_t *>(tile + tile_offset<D>(row + g, n));
        uint32_t *down = reinterpret_cast<uint32_t *>(tile + tile_offset<D>(row + g + 8, n));
        up[t] = pack2<T>(d[n][0] * upper, d[n][1] * upper);
        down[t] = pack2<T>(d[n][2] * lower, d[n][3] * lower);
    }
}

/// Sum and maximum over the 4 lanes that share a row of an accumulator.
DEVICE float quad_sum(float v) {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
    return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}

DEVICE float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
}

#endif
