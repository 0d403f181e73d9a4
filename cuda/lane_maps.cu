/// Which lane holds what: kernels that do one instruction of ptx.cuh on given registers and store every
/// lane's result.
///
/// The emulator's answers are compared with plain loops; a device's answers with the emulator's. All kernels:
/// blocks of 32 threads, block i works on fragment i of each operand.
#include "compat.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "types.cuh"

template <typename T> DEVICE void lane_map_mma(const LaneMapMma &p) {
    size_t lane = size_t(blockIdx.x) * 32 + threadIdx.x;
    uint32_t a[4], b[2];
    float d[4];
    UNROLL
    for (int i = 0; i < 4; i++) a[i] = p.a[lane * 4 + i];
    UNROLL
    for (int i = 0; i < 2; i++) b[i] = p.b[lane * 2 + i];
    UNROLL
    for (int i = 0; i < 4; i++) d[i] = p.c[lane * 4 + i];
    mma_16x8x16<T>(d, a, b);
    UNROLL
    for (int i = 0; i < 4; i++) p.d[lane * 4 + i] = d[i];
}

KERNEL(lane_map_mma_f16, LaneMapMma, 32) { lane_map_mma<half_t>(p); }
#if GLM_HAS_BF16
KERNEL(lane_map_mma_bf16, LaneMapMma, 32) { lane_map_mma<bf16_t>(p); }
#endif

/// Shared memory: 512 bytes, the four tiles one below the other.
template <int TILES, bool TRANSPOSED> DEVICE void lane_map_ldmatrix(const LaneMapLdmatrix &p) {
    SHARED_MEMORY(uint16_t, tiles);
    size_t lane = size_t(blockIdx.x) * 32 + threadIdx.x;
    store_16(tiles + threadIdx.x * 8, load_16(p.tiles + lane * 8));
    __syncthreads();
    uint32_t r[TILES];
    if constexpr (TILES == 4 && TRANSPOSED)
        ldmatrix_x4_trans(r, tiles + threadIdx.x * 8);
    else if constexpr (TILES == 4)
        ldmatrix_x4(r, tiles + threadIdx.x * 8);
    else if constexpr (TRANSPOSED)
        ldmatrix_x2_trans(r, tiles + threadIdx.x * 8);
    else
        ldmatrix_x2(r, tiles + threadIdx.x * 8);
    UNROLL
    for (int i = 0; i < TILES; i++) p.r[lane * TILES + i] = r[i];
}

// static: lane_map_ldmatrix_* shared=512
KERNEL(lane_map_ldmatrix_x4, LaneMapLdmatrix, 32) { lane_map_ldmatrix<4, false>(p); }
KERNEL(lane_map_ldmatrix_x4_trans, LaneMapLdmatrix, 32) { lane_map_ldmatrix<4, true>(p); }
KERNEL(lane_map_ldmatrix_x2, LaneMapLdmatrix, 32) { lane_map_ldmatrix<2, false>(p); }
KERNEL(lane_map_ldmatrix_x2_trans, LaneMapLdmatrix, 32) { lane_map_ldmatrix<2, true>(p); }

/// Results that are the same bit by bit on any device (all but the exponential).
KERNEL(lane_map_bits, LaneMapBits, 32) {
    size_t lane = size_t(blockIdx.x) * 32 + threadIdx.x;
    uint32_t x = p.x[lane * 3], y = p.x[lane * 3 + 1], z = p.x[lane * 3 + 2];
    uint32_t *r = p.r + lane * 24;
    r[0] = prmt(x, y, z);
    r[1] = lop3<0x6A>(x, y, z);
    r[2] = lop3<0xE4>(x, y, z);
    r[3] = mul2<half_t>(x, y);
    r[4] = add2<half_t>(x, y);
    r[5] = fma2<half_t>(x, y, z);
    r[6] = float_to_half_bits(__uint_as_float(x));
    r[7] = pack_half2(__uint_as_float(x), __uint_as_float(y));
    r[8] = __float_as_uint(half_bits_to_float(uint16_t(x)));
    r[9] = __shfl_sync(0xFFFFFFFFu, x, int(threadIdx.x * 5 % 32));
    r[10] = __shfl_xor_sync(0xFFFFFFFFu, x, 5);
    r[11] = __shfl_down_sync(0xFFFFFFFFu, x, 3, 8);
    r[12] = __shfl_xor_sync(0xFFFFFFFFu, x, 16, 8); // out of the group of 8
    r[13] = __ballot_sync(0xFFFFFFFFu, x & 1);
    r[14] = uint32_t(__any_sync(0xFFFFFFFFu, (x & 31) == 0));
    r[15] = uint32_t(__all_sync(0xFFFFFFFFu, (x & 31) != 0));
    r[16] = __umulhi(x, y);
    r[17] = uint32_t(__popc(x)) | uint32_t(__ffs(int(y))) << 8;
    r[18] = __float_as_uint(exp2_approx(float(int(x >> 16)) * (1.0f / 256.0f) - 128.0f));
#if GLM_HAS_BF16
    r[19] = mul2<bf16_t>(x, y);
    r[20] = add2<bf16_t>(x, y);
    r[21] = fma2<bf16_t>(x, y, z);
    r[22] = float_to_bf16_bits(__uint_as_float(x));
    r[23] = pack_bf162(__uint_as_float(x), __uint_as_float(y));
#else
    UNROLL
    for (int i = 19; i < 24; i++) r[i] = 0;
#endif
}
