/// Weights in 8 bits with a scale for each row, as THUDM's chatglm-6b-int8 has them: decoded, and multiplied.
///
/// `gemm_*_*i*` are the products of gemm.cu with such a b: the same tiles, the same sums, so the same bits as with the dense
/// matrix that `int8_dequantize` makes. `gemm_few_ti*` has up to 16 rows of a, as when tokens are generated.
#include "int8.cuh"

/// A row a blockIdx.x, four elements a thread of blockIdx.y.
template <typename T> DEVICE void int8_dequantize(const Int8Dequantize &p) {
    uint32_t column = (blockIdx.y * blockDim.x + threadIdx.x) * 4, row = blockIdx.x;
    if (column >= p.columns) return;
    uint64_t at = uint64_t(row) * p.columns + column;
    float v[4], scale = p.scales[row];
    load_codes(v, p.codes + at, p.columns % 4 == 0 && reinterpret_cast<uintptr_t>(p.codes) % 4 == 0, p.columns - column);
    T *out = static_cast<T *>(p.out) + at;
    UNROLL
    for (int e = 0; e < 4; ++e) {
        if (column + e < p.columns) out[e] = from_float<T>(__fmul_rn(v[e], scale));
    }
}
// static: int8_dequantize threads=256 shared=0
KERNELS_FOR_TYPES(int8_dequantize, Int8Dequantize, 256)

// --- Many rows ------------------------------------------------------------------------------------------------------------

#define INT8_GEMM(name, A, C, INNER_B)                                                                       \
    template <typename T> DEVICE void name(const Gemm &p) {                                                  \
        multiply<LargeTiling, T, A, int8_t, C, Inner::K, Inner::INNER_B>(p);                                 \
    }                                                                                                        \
    template <typename T> DEVICE void name##_small(const Gemm &p) {                                          \
        multiply<SmallTiling, T, A, int8_t, C, Inner::K, Inner::INNER_B>(p);                                 \
    }
INT8_GEMM(gemm_nt_tit, T, T, K)
INT8_GEMM(gemm_nt_tif, T, float, K)
INT8_GEMM(gemm_nn_tit, T, T, EXTENT)
INT8_GEMM(gemm_nn_fif, float, float, EXTENT)

#define INT8_KERNELS(name, T, suffix)                                                                        \
    KERNEL_MIN(name##_##suffix, Gemm, GLM_GEMM_THREADS, 2) { name<T>(p); }                                   \
    KERNEL_MIN(name##_small_##suffix, Gemm, GLM_GEMM_THREADS, 2) { name##_small<T>(p); }
#define INT8_KERNELS_OF(T, suffix)                                                                           \
    INT8_KERNELS(gemm_nt_tit, T, suffix)                                                                     \
    INT8_KERNELS(gemm_nt_tif, T, suffix)                                                                     \
    INT8_KERNELS(gemm_nn_tit, T, suffix)                                                                     \
    INT8_KERNELS(gemm_nn_fif, T, suffix)

// static: gemm_n* threads=128 shared=49152 shared75=32768 expect=mma
INT8_KERNELS_OF(half_t, f16)
#if GLM_HAS_BF16
INT8_KERNELS_OF(bf16_t, bf16)
#endif

// --- Few rows -------------------------------------------------------------------------------------------------------------

namespace {

constexpr int WARPS = GLM_GEMM_FEW_THREADS / 32;
constexpr int OUTPUTS = GLM_GEMM_FEW_OUTPUTS;
// As in gemm_few.cu: every other token's row begins 8 banks further.
constexpr int STRIDE = OUTPUTS + 4;
static_assert(WARPS * GLM_GEMM_FEW_ROWS * STRIDE * 4 == GLM_GEMM_FEW_SHARED_BYTES, "launched with other shared memory");

/// The sums of a warp: TOKENS times 8 tokens, 2 times 16 outputs, of codes without their scales: those are exact in T.
///
/// As gemm_few.cu, with 16 bytes of b for 16 of k: lane t of four takes elements 16t .. 16t + 15 of every 64, for the positions
/// that four fragments have for it.
template <typename T, int TOKENS> DEVICE void few_rows(const Gemm &p, float *shared) {
    constexpr int SLICES = 2;
    constexpr int STEP = 64 * SLICES; // of k for each warp: 128 bytes of a row of b
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float sums[TOKENS][2][4] = {};
    _Pragma("unroll 1")
    for (int begin = warp * STEP; begin < p.k; begin += WARPS * STEP) {
        U128 of_b[SLICES][4] = {}, of_a[SLICES][TOKENS][2] = {};
        UNROLL
        for (int s = 0; s < SLICES; ++s) {
            int k = begin + 64 * s + 16 * t;
            if (k >= p.k) continue;
            UNROLL
            for (int i = 0; i < 4; ++i) {
                int row = blockIdx.x * OUTPUTS + 8 * i + g;
                if (row < p.n) of_b[s][i] = load_stream_16(static_cast<const int8_t *>(p.b) + int64_t(row) * p.k + k);
            }
            UNROLL
            for (int i = 0; i < TOKENS; ++i) {
                if (8 * i + g >= p.m) continue;
                const T *a = static_cast<const T *>(p.a) + int64_t(8 * i + g) * p.k + k;
                of_a[s][i][0] = load_16(a);
                of_a[s][i][1] = load_16(a + 8);
            }
        }
        UNROLL
        for (int s = 0; s < SLICES; ++s) {
            UNROLL
            for (int f = 0; f < 4; ++f) { // four of the lane's elements
                uint32_t b[4][2];
                UNROLL
                for (int i = 0; i < 4; ++i) {
                    const U128 &codes = of_b[s][i];
                    float v[4];
                    int8_to_floats(f == 0 ? codes.x : f == 1 ? codes.y : f == 2 ? codes.z : codes.w, v);
                    b[i][0] = pack2<T>(v[0], v[1]);
                    b[i][1] = pack2<T>(v[2], v[3]);
                }
                UNROLL
                for (int i = 0; i < TOKENS; ++i) {
                    const U128 &x = of_a[s][i][f / 2];
                    uint32_t pair[2] = {f % 2 ? x.z : x.x, f % 2 ? x.w : x.y};
                    UNROLL
                    for (int j = 0; j < 2; ++j) {
                        mma_16x8x16<T>(sums[i][j], {b[2 * j][0], b[2 * j + 1][0], b[2 * j][1], b[2 * j + 1][1]}, pair);
                    }
                }
            }
        }
    }
    float *mine = shared + warp * GLM_GEMM_FEW_ROWS * STRIDE;
    UNROLL
    for (int i = 0; i < TOKENS; ++i) {
        UNROLL
        for (int j = 0; j < 2; ++j) {
            UNROLL
            for (int e = 0; e < 4; ++e) {
                mine[(8 * i + 2 * t + e % 2) * STRIDE + 16 * j + 8 * (e / 2) + g] = sums[i][j][e];
            }
        }
    }
}

template <typename T, typename C> DEVICE void gemm_few(const Gemm &p) {
    SHARED_MEMORY(float, shared);
    if (p.m <= 8) {
        few_rows<T, 1>(p, shared);
    } else {
        few_rows<T, 2>(p, shared);
    }
    __syncthreads();
    Output<C> output = output_of<C>(p);
    int column = blockIdx.x * OUTPUTS + threadIdx.x % OUTPUTS;
    if (column >= p.n) return;
    float scale = p.scales[column];
    for (int row = threadIdx.x / OUTPUTS; row < p.m; row += GLM_GEMM_FEW_THREADS / OUTPUTS) {
        float v = 0.0f;
        UNROLL
        for (int w = 0; w < WARPS; ++w) {
            v += shared[(w * GLM_GEMM_FEW_ROWS + row) * STRIDE + threadIdx.x % OUTPUTS];
        }
        output.one(v * scale, int64_t(row) * p.stride + column, column);
    }
}

} // namespace

/// Limits: M at most 16; K a multiple of 16; a and b aligned to 16 bytes.
// static: gemm_few_ti* threads=256 shared=18432 expect=mma,load16
KERNEL_MIN(gemm_few_tit_f16, Gemm, GLM_GEMM_FEW_THREADS, 2) { gemm_few<half_t, half_t>(p); }
KERNEL_MIN(gemm_few_tif_f16, Gemm, GLM_GEMM_FEW_THREADS, 2) { gemm_few<half_t, float>(p); }
#if GLM_HAS_BF16
KERNEL_MIN(gemm_few_tit_bf16, Gemm, GLM_GEMM_FEW_THREADS, 2) { gemm_few<bf16_t, bf16_t>(p); }
KERNEL_MIN(gemm_few_tif_bf16, Gemm, GLM_GEMM_FEW_THREADS, 2) { gemm_few<bf16_t, float>(p); }
#endif
