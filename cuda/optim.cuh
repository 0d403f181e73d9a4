/// The arithmetic of an AdamW step on one element.
#ifndef GLM_OPTIM_CUH
#define GLM_OPTIM_CUH

#include "compat.cuh"
#include "kernels.h"

/// `g = clip g; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g g;
/// p = decay p - step_size m / (sqrt(v) / sqrt_correction2 + epsilon)`.
///
/// No product is fused with the sum it goes into: the bits, and so the 8-bit codes, are those of the CPU.
DEVICE void adamw_element(float &p, float g, float &m, float &v, float decay, float step_size,
                          const AdamwFactors &f) {
    g = __fmul_rn(g, f.clip);
    m += __fmul_rn(f.one_minus_beta1, g - m);
    v = __fmul_rn(v, f.beta2) + __fmul_rn(__fmul_rn(f.one_minus_beta2, g), g);
    const float denominator = __fdiv_rn(__fsqrt_rn(v), f.sqrt_correction2) + f.epsilon;
    p = __fmul_rn(p, decay) - __fdiv_rn(__fmul_rn(step_size, m), denominator);
}

#endif
