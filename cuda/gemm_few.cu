/// Products of up to 16 rows with a dense matrix, `c [M, N] = alpha * a bᵀ + ...`, as when tokens are
/// generated: as fast as b [N, K] can be read, once.
///
/// A block of 8 warps has 32 rows of b and all of a; its warps take turns along K, 64 at a time, and add up
/// their sums through shared memory at the end. b is the operand of mma with 16 rows, a the one with 8, so 16
/// tokens cost two mma. The order of k within an mma is free as long as both operands agree: lane t of four
/// takes elements 8t .. 8t + 7 of every 32, one load of 16 bytes, for the positions that two fragments have
/// for it.
///
/// Limits: M at most 16; K a multiple of 8; a and b aligned to 16 bytes.
#include "gemm.cuh"

namespace {

constexpr int WARPS = GLM_GEMM_FEW_THREADS / 32;
constexpr int OUTPUTS = GLM_GEMM_FEW_OUTPUTS;
// Every other token's row begins 8 banks further, so that lanes write to different banks.
constexpr int STRIDE = OUTPUTS + 4;
static_assert(WARPS * GLM_GEMM_FEW_ROWS * STRIDE * 4 == GLM_GEMM_FEW_SHARED_BYTES,
              "launched with other shared memory");

/// A lane's eight elements of a row, or zeros.
template <bool STREAM, typename T> DEVICE U128 elements(const T *row, int k, bool valid) {
    U128 v{0, 0, 0, 0};
    if (valid) v = STREAM ? load_stream_16(row + k) : load_16(row + k);
    return v;
}

/// The sums of a warp: TOKENS times 8 tokens, 2 times 16 outputs.
template <typename T, int TOKENS> DEVICE void few_rows(const Gemm &p, float *shared) {
    constexpr int STEP = 64; // of k for each warp: 128 bytes of a row of b
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const T *a[TOKENS];
    bool token[TOKENS];
    UNROLL
    for (int i = 0; i < TOKENS; ++i) {
        token[i] = 8 * i + g < p.m;
        a[i] = static_cast<const T *>(p.a) + int64_t(8 * i + g) * p.k;
    }
    const T *b[4];
    bool output[4];
    UNROLL
    for (int i = 0; i < 4; ++i) {
        int row = blockIdx.x * OUTPUTS + 8 * i + g;
        output[i] = row < p.n;
        b[i] = static_cast<const T *>(p.b) + int64_t(row) * p.k;
    }
    float sums[TOKENS][2][4] = {};
    _Pragma("unroll 1")
    for (int begin = warp * STEP; begin < p.k; begin += WARPS * STEP) {
        U128 of_b[STEP / 32][4], of_a[STEP / 32][TOKENS];
        UNROLL
        for (int s = 0; s < STEP / 32; ++s) {
            int k = begin + 32 * s + 8 * t;
            UNROLL
            for (int i = 0; i < 4; ++i) of_b[s][i] = elements<true>(b[i], k, output[i] && k < p.k);
            UNROLL
            for (int i = 0; i < TOKENS; ++i) of_a[s][i] = elements<false>(a[i], k, token[i] && k < p.k);
        }
        UNROLL
        for (int s = 0; s < STEP / 32; ++s) {
            UNROLL
            for (int i = 0; i < TOKENS; ++i) {
                const U128 &x = of_a[s][i];
                UNROLL
                for (int j = 0; j < 2; ++j) {
                    const U128 &upper = of_b[s][2 * j], &lower = of_b[s][2 * j + 1];
                    mma_16x8x16<T>(sums[i][j], {upper.x, lower.x, upper.y, lower.y}, {x.x, x.y});
                    mma_16x8x16<T>(sums[i][j], {upper.z, lower.z, upper.w, lower.w}, {x.z, x.w});
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
    for (int row = threadIdx.x / OUTPUTS; row < p.m; row += GLM_GEMM_FEW_THREADS / OUTPUTS) {
        float v = 0.0f;
        UNROLL
        for (int w = 0; w < WARPS; ++w) {
            v += shared[(w * GLM_GEMM_FEW_ROWS + row) * STRIDE + threadIdx.x % OUTPUTS];
        }
        output.one(v, int64_t(row) * p.stride + column, column);
    }
}

} // namespace

// static: gemm_few_* threads=256 shared=18432 expect=mma,load16
KERNEL_MIN(gemm_few_ttt_f16, Gemm, GLM_GEMM_FEW_THREADS, 2) { gemm_few<half_t, half_t>(p); }
KERNEL_MIN(gemm_few_ttf_f16, Gemm, GLM_GEMM_FEW_THREADS, 2) { gemm_few<half_t, float>(p); }
#if GLM_HAS_BF16
KERNEL_MIN(gemm_few_ttt_bf16, Gemm, GLM_GEMM_FEW_THREADS, 2) { gemm_few<bf16_t, bf16_t>(p); }
KERNEL_MIN(gemm_few_ttf_bf16, Gemm, GLM_GEMM_FEW_THREADS, 2) { gemm_few<bf16_t, float>(p); }
#endif
