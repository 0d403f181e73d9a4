/// Weights in 8 bits with a scale for each row: how codes become numbers, and the loader that makes them an operand of the
/// dense products of gemm.cuh.
#ifndef GLM_INT8_CUH
#define GLM_INT8_CUH

#include "gemm.cuh"

/// The four signed codes of a word, exactly.
///
/// A byte u under the exponent of 2^23 is 2^23 + u, and u = q + 128 once its top bit is flipped: a PRMT and a subtraction,
/// where a conversion would go to a unit of a quarter of the throughput.
DEVICE void int8_to_floats(uint32_t word, float (&v)[4]) {
    word ^= 0x80808080u;
    UNROLL
    for (uint32_t i = 0; i < 4; ++i) v[i] = __uint_as_float(prmt(word, 0x4B000000u, 0x7540u + i)) - 8388736.0f;
}

/// Four codes as numbers; only the first `left` exist, the others become 0. `wide`: `from` lies on a multiple of 4 bytes, and
/// `left` is 0 or at least 4.
DEVICE void load_codes(float (&v)[4], const int8_t *from, bool wide, int left) {
    uint32_t word = 0;
    if (wide) {
        if (left > 0) word = *reinterpret_cast<const uint32_t *>(from);
    } else {
        UNROLL
        for (int e = 0; e < 4; ++e) word |= e < left ? uint32_t(uint8_t(from[e])) << 8 * e : 0;
    }
    int8_to_floats(word, v);
}

/// Brings tiles of a matrix of codes to shared memory as elements T, `code * scale` rounded once: what a dense matrix of T
/// would hold. A row of the matrix, as it lies in memory, has one scale. Codes wait in registers for their turn to be decoded,
/// so that a stage's loads are under way during the products of another.
template <typename T, Inner INNER, int EXTENT, int DEPTH, int THREADS>
struct Loader<T, int8_t, INNER, EXTENT, DEPTH, THREADS> {
    using Tile = SharedTile<INNER, EXTENT, DEPTH>;
    static constexpr int STEP = THREADS / Tile::CHUNKS;
    static constexpr int COUNT = Tile::ROWS / STEP;
    static_assert(STEP % 8 == 0 && COUNT * STEP == Tile::ROWS, "one swizzle serves all chunks of a thread");

    const int8_t *first; // this thread's first chunk in the tile at k = 0
    const float *scales;
    int row, column;
    int rows, columns;
    int place;
    bool wide;
    uint64_t codes[COUNT];
    float scale[COUNT];

    DEVICE Loader(const void *matrix, const float *scales, int extent, int k, int start) : scales(scales) {
        row = threadIdx.x / Tile::CHUNKS;
        int chunk = threadIdx.x % Tile::CHUNKS;
        column = chunk * 8;
        place = Tile::offset(row, chunk);
        (INNER == Inner::K ? row : column) += start;
        rows = INNER == Inner::K ? extent : k;
        columns = INNER == Inner::K ? k : extent;
        first = static_cast<const int8_t *>(matrix) + int64_t(row) * columns + column;
        wide = columns % 8 == 0 && reinterpret_cast<uintptr_t>(matrix) % 8 == 0;
    }

    /// Begins to bring the tile at `k`.
    DEVICE void fetch(T *, int k) {
        const int8_t *from = first + (INNER == Inner::K ? int64_t(k) : int64_t(k) * columns);
        int r = row + (INNER == Inner::K ? 0 : k);
        int c = column + (INNER == Inner::K ? k : 0);
        UNROLL
        for (int i = 0; i < COUNT; ++i) {
            bool valid = r + i * STEP < rows;
            const int8_t *chunk = from + int64_t(i * STEP) * columns;
            codes[i] = 0;
            scale[i] = valid ? scales[r + i * STEP] : 0.0f;
            if (wide) {
                if (valid && c < columns) codes[i] = *reinterpret_cast<const uint64_t *>(chunk);
            } else {
                _Pragma("unroll 1")
                for (int e = 0; e < 8; ++e) {
                    if (valid && c + e < columns) codes[i] |= uint64_t(uint8_t(chunk[e])) << 8 * e;
                }
            }
        }
    }

    /// Decodes what fetch brought into `tile`.
    DEVICE void put(T *tile) {
        UNROLL
        for (int i = 0; i < COUNT; ++i) {
            float low[4], high[4];
            int8_to_floats(uint32_t(codes[i]), low);
            int8_to_floats(uint32_t(codes[i] >> 32), high);
            UNROLL
            for (int e = 0; e < 4; ++e) {
                low[e] *= scale[i];
                high[e] *= scale[i];
            }
            store_16(tile + place + i * STEP * Tile::COLUMNS,
                     U128{pack2<T>(low[0], low[1]), pack2<T>(low[2], low[3]), pack2<T>(high[0], high[1]),
                          pack2<T>(high[2], high[3])});
        }
    }
};

#endif
