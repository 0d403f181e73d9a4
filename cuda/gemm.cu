/// Products of dense matrices by tensor cores.
///
/// `gemm_*` gives a tile of 128 x 128 of c to a block of 4 warps, `gemm_*_small` one of 64 x 64, and a part
/// of K with it: the products with an adapter's r columns, and gradients of adapters, have few tiles and a
/// long sum. `gemm_sum` adds the parts in their order, so that results do not depend on which block came
/// first.
#include "gemm.cuh"

template <typename C> DEVICE void gemm_sum(const Gemm &p) {
    int64_t size = int64_t(p.m) * p.n, at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= size) return;
    float v = 0.0f;
    for (int s = 0; s < p.splits; ++s) v += p.partial[s * size + at];
    output_of<C>(p).one(v, at / p.n * p.stride + at % p.n, int(at % p.n));
}

// Spelled as functions of T, so that one macro makes the kernels of both.
#define GEMM(name, A, B, C, INNER_A, INNER_B)                                                                \
    template <typename T> DEVICE void name(const Gemm &p) {                                                  \
        multiply<LargeTiling, T, A, B, C, Inner::INNER_A, Inner::INNER_B>(p);                                \
    }                                                                                                        \
    template <typename T> DEVICE void name##_small(const Gemm &p) {                                          \
        multiply<SmallTiling, T, A, B, C, Inner::INNER_A, Inner::INNER_B>(p);                                \
    }
GEMM(gemm_nt_ttt, T, T, T, K, K)
GEMM(gemm_nt_tft, T, float, T, K, K)
GEMM(gemm_nt_ttf, T, T, float, K, K)
GEMM(gemm_nt_tff, T, float, float, K, K)
GEMM(gemm_nn_ttt, T, T, T, K, EXTENT)
GEMM(gemm_nn_tft, T, float, T, K, EXTENT)
GEMM(gemm_nn_ftf, float, T, float, K, EXTENT)
GEMM(gemm_nn_fff, float, float, float, K, EXTENT)
GEMM(gemm_tn_ttf, T, T, float, EXTENT, EXTENT)
GEMM(gemm_tn_ftf, float, T, float, EXTENT, EXTENT)

#define GEMM_KERNELS(name, T, suffix)                                                                        \
    KERNEL_MIN(name##_##suffix, Gemm, GLM_GEMM_THREADS, 2) { name<T>(p); }                                   \
    KERNEL_MIN(name##_small_##suffix, Gemm, GLM_GEMM_THREADS, 2) { name##_small<T>(p); }

#define GEMM_KERNELS_OF(T, suffix)                                                                           \
    GEMM_KERNELS(gemm_nt_ttt, T, suffix)                                                                     \
    GEMM_KERNELS(gemm_nt_tft, T, suffix)                                                                     \
    GEMM_KERNELS(gemm_nt_ttf, T, suffix)                                                                     \
    GEMM_KERNELS(gemm_nt_tff, T, suffix)                                                                     \
    GEMM_KERNELS(gemm_nn_ttt, T, suffix)                                                                     \
    GEMM_KERNELS(gemm_nn_tft, T, suffix)                                                                     \
    GEMM_KERNELS(gemm_nn_ftf, T, suffix)                                                                     \
    GEMM_KERNELS(gemm_nn_fff, T, suffix)                                                                     \
    GEMM_KERNELS(gemm_tn_ttf, T, suffix)                                                                     \
    GEMM_KERNELS(gemm_tn_ftf, T, suffix)

// static: gemm_n* threads=128 shared=49152 shared75=32768 expect=mma,load16
// static: gemm_t* threads=128 shared=49152 shared75=32768 expect=mma,load16
GEMM_KERNELS_OF(half_t, f16)
#if GLM_HAS_BF16
GEMM_KERNELS_OF(bf16_t, bf16)
#endif
KERNELS_FOR_TYPES(gemm_sum, Gemm, GLM_GEMM_SUM_THREADS)
