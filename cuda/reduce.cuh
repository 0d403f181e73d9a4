/// Sums and maxima over a warp and a block. The order of additions depends on nothing but the block's size,
/// so the same inputs give the same bits, and every lane and thread gets the same bits.
#ifndef GLM_REDUCE_CUH
#define GLM_REDUCE_CUH

#include "compat.cuh"

/// Floats of shared memory that block_sum and block_max need: one per warp.
constexpr int REDUCE_SCRATCH = 32;

/// Sum over the 32 lanes, in every lane. All lanes must call it.
DEVICE float warp_sum(float v WHERE_PARAM) {
    UNROLL
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, offset, 32 WHERE_ARG);
    return v;
}

/// Maximum over the 32 lanes, in every lane. NaN is passed over, as fmaxf does. All lanes must call it.
DEVICE float warp_max(float v WHERE_PARAM) {
    UNROLL
    for (int offset = 16; offset > 0; offset /= 2)
        v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, offset, 32 WHERE_ARG));
    return v;
}

/// Sum over all threads of a block (1-D, a multiple of 32), in every thread. `scratch` is REDUCE_SCRATCH
/// floats of shared memory, used by nothing else between two calls' barriers; calls may follow each other
/// with the same scratch.
DEVICE float block_sum(float v, float *scratch WHERE_PARAM) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    v = warp_sum(v WHERE_ARG);
    if (warps == 1) return v;
    __syncthreads(WHERE_FIRST); // an earlier call may still be reading scratch
    if (lane == 0) scratch[warp] = v;
    __syncthreads(WHERE_FIRST);
    return warp_sum(lane < warps ? scratch[lane] : 0.0f WHERE_ARG);
}

/// Maximum over all threads of a block, in every thread; else as block_sum.
DEVICE float block_max(float v, float *scratch WHERE_PARAM) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    v = warp_max(v WHERE_ARG);
    if (warps == 1) return v;
    __syncthreads(WHERE_FIRST); // an earlier call may still be reading scratch
    if (lane == 0) scratch[warp] = v;
    __syncthreads(WHERE_FIRST);
    return warp_max(lane < warps ? scratch[lane] : -INFINITY WHERE_ARG);
}

#endif
