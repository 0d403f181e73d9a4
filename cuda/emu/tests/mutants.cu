/// A reduction and a tiled product, right with MUTANT 0, and each other number plants a bug that has been
/// written before. The tests of mutants.cpp must pass for 0 and fail for every other number.
#include "compat.cuh"
#include "mutants.h"
#include "ptx.cuh"
#include "types.cuh"

#ifndef MUTANT
#define MUTANT 0
#endif

/// Twice the sum of each warp's own, through shared memory: scratch is used again at once.
/// y[i] = sum of x over the block, plus, scaled by 1000, the sum of the squares.
KERNEL(mutant_reduce, MutantReduce, 256) {
    SHARED_MEMORY(float, scratch);
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float v = p.x[i], total[2];
    for (int round = 0; round < 2; round++) {
        float part = round == 0 ? v : v * v;
        for (int offset = 16; offset > 0; offset /= 2) part += __shfl_xor_sync(0xFFFFFFFFu, part, offset);
        if (lane == 0) scratch[warp] = part;
        __syncthreads();
        total[round] = 0;
        for (uint32_t w = 0; w < blockDim.x / 32; w++) total[round] += scratch[w];
#if MUTANT != MISSING_BARRIER_AFTER_REDUCTION
        __syncthreads();
#endif
    }
    p.y[i] = total[0] + 1000.0f * total[1];
}

/// y = x transposed within 32 x 32 tiles of one warp, through shared memory; n: elements, any number.
KERNEL(mutant_transpose, MutantReduce, 32) {
    SHARED_MEMORY(float, tile);
    uint32_t base = blockIdx.x * 1024;
    for (uint32_t row = 0; row < 32; row++) {
        uint32_t i = base + row * 32 + threadIdx.x;
        tile[row * 33 + threadIdx.x] = i < p.n ? p.x[i] : 0.0f;
    }
#if MUTANT != MISSING_SYNCWARP
    __syncwarp();
#endif
    for (uint32_t row = 0; row < 32; row++) {
        uint32_t i = base + row * 32 + threadIdx.x;
#if MUTANT == OFF_BY_ONE
        if (i <= p.n) p.y[i] = tile[threadIdx.x * 33 + row];
#else
        if (i < p.n) p.y[i] = tile[threadIdx.x * 33 + row];
#endif
    }
}

/// c (m, n) = a (m, k) b (k, n) in f16 with float sums; k, n multiples of 32, m any. Tile 32 x 32 x 32, 4
/// warps of 16 x 16, STAGES stages of cp.async.
template <int STAGES> DEVICE void mutant_gemm(const MutantGemm &p) {
    constexpr int PITCH = 40, TILE = 32 * PITCH;
    SHARED_MEMORY(half_t, as);
    half_t *bs = as + STAGES * TILE;
    const half_t *a = static_cast<const half_t *>(p.a), *b = static_cast<const half_t *>(p.b);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m0 = blockIdx.y * 32, n0 = blockIdx.x * 32,
        tiles = p.k / 32;
    float sums[2][4] = {};
    auto fill = [&](int tile) {
        int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8,
            at = tile % STAGES * TILE + row * PITCH + column;
        if (tile < tiles) {
            cp_async_16(as + at, a + size_t(m0 + row) * p.k + tile * 32 + column, m0 + row < p.m);
            cp_async_16(bs + at, b + size_t(tile * 32 + row) * p.n + n0 + column, true);
        }
        cp_async_commit();
    };
    for (int tile = 0; tile < STAGES - 1; tile++) fill(tile);
    for (int tile = 0; tile < tiles; tile++) {
        if constexpr (STAGES == 1) fill(tile);
#if MUTANT == MISSING_WAIT
        if (tile + 1 == tiles) cp_async_wait<0>();
#elif MUTANT == WAIT_OFF_BY_ONE
        if (tile + 1 == tiles)
            cp_async_wait<0>();
        else
            cp_async_wait<STAGES - 1>();
#else
        cp_async_wait<(STAGES > 1 ? STAGES - 2 : 0)>();
#endif
#if MUTANT != MISSING_BARRIER_BEFORE_READ
        __syncthreads();
#endif
        if constexpr (STAGES > 1) fill(tile + STAGES - 1);
        const half_t *ta = as + tile % STAGES * TILE, *tb = bs + tile % STAGES * TILE;
        for (int k = 0; k < 32; k += 16) {
            uint32_t fa[4], fb[4];
            ldmatrix_x4(fa, ta + (warp / 2 * 16 + lane % 16) * PITCH + k + lane / 16 * 8);
            ldmatrix_x4_trans(fb, tb + (k + lane % 16) * PITCH + warp % 2 * 16 + lane / 16 * 8);
            mma_16x8x16<half_t>(sums[0], fa, {fb[0], fb[1]});
            mma_16x8x16<half_t>(sums[1], fa, {fb[2], fb[3]});
        }
#if MUTANT != MISSING_BARRIER_BEFORE_REFILL
        if constexpr (STAGES == 1) __syncthreads(); // with more, the next barrier comes before the next fill
#endif
    }
    cp_async_wait<0>();
    for (int j = 0; j < 2; j++)
        for (int i = 0; i < 4; i++) {
#if MUTANT == WRONG_LANE_MAP
            int row = m0 + warp / 2 * 16 + lane / 4 + i % 2 * 8,
                column = n0 + warp % 2 * 16 + j * 8 + lane % 4 * 2 + i / 2;
#else
            int row = m0 + warp / 2 * 16 + lane / 4 + i / 2 * 8,
                column = n0 + warp % 2 * 16 + j * 8 + lane % 4 * 2 + i % 2;
#endif
            if (row < p.m) p.c[size_t(row) * p.n + column] = sums[j][i];
        }
}
KERNEL(mutant_gemm_1, MutantGemm, 128) { mutant_gemm<1>(p); }
KERNEL(mutant_gemm_3, MutantGemm, 128) { mutant_gemm<3>(p); }
