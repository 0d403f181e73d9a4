/// Cross-entropy over logits of which one chunk of the vocabulary exists at a time.
#include "compat.cuh"
#include "kernels.h"
#include "reduce.cuh"
#include "types.cuh"

/// One block per row. Each thread keeps a running maximum and sum, so that logits are read once; shared
/// memory is REDUCE_SCRATCH floats.
// static: softmax_statistics threads=256 shared=128 expect=load16
KERNEL(softmax_statistics, SoftmaxStatistics, GLM_LOSS_THREADS) {
    SHARED_MEMORY(float, scratch);
    const float *row = p.logits + int64_t(blockIdx.x) * p.width;
    bool wide = p.width % 4 == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0;
    float top = -INFINITY, sum = 0.0f;
    // Relative to 0 while nothing finite was seen: -infinity less itself would be NaN. A logit that is NaN is
    // passed over by fmaxf but makes the sum NaN.
    auto base = [](float top) { return top == -INFINITY ? 0.0f : top; };
    auto take = [&](float largest) {
        float old = top;
        top = fmaxf(top, largest);
        sum *= expf(old - base(top));
    };
    if (wide) {
        for (int i = 4 * threadIdx.x; i < p.width; i += 4 * GLM_LOSS_THREADS) {
            Vec<float> z = Vec<float>::load(row + i);
            take(fmaxf(fmaxf(z.get(0), z.get(1)), fmaxf(z.get(2), z.get(3))));
            UNROLL
            for (int e = 0; e < 4; ++e) sum += expf(z.get(e) - base(top));
        }
    } else {
        for (int i = threadIdx.x; i < p.width; i += GLM_LOSS_THREADS) {
            take(row[i]);
            sum += expf(row[i] - base(top));
        }
    }
    take(block_max(top, scratch));
    sum = block_sum(sum, scratch);
    if (threadIdx.x != 0) return;

    float *statistics = p.statistics + 3 * int64_t(blockIdx.x);
    int target = p.targets[blockIdx.x];
    if (p.start == 0) {
        statistics[2] = 0.0f;
        if (target < 0 || target >= p.vocabulary) sum = NAN;
    } else {
        float before = statistics[1] * expf(statistics[0] - base(fmaxf(statistics[0], top)));
        take(statistics[0]);
        sum += before;
    }
    statistics[0] = top;
    statistics[1] = top == -INFINITY ? NAN : sum;
    if (target >= p.start && target - p.start < p.width) statistics[2] = row[target - p.start];
}

/// One block per row (blockIdx.x) and GLM_SOFTMAX_GRADIENT_WIDTH of its logits (blockIdx.y); no shared
/// memory.
// static: softmax_gradient threads=256 shared=0 expect=load16
KERNEL(softmax_gradient, SoftmaxGradient, GLM_LOSS_THREADS) {
    float *row = p.logits + int64_t(blockIdx.x) * p.width;
    bool wide = p.width % 4 == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0;
    int begin = blockIdx.y * GLM_SOFTMAX_GRADIENT_WIDTH;
    int end = min(begin + GLM_SOFTMAX_GRADIENT_WIDTH, p.width);
    const float *statistics = p.statistics + 3 * int64_t(blockIdx.x);
    float top = statistics[0], factor = p.scale / statistics[1];
    int target = p.targets[blockIdx.x] - p.start;
    auto gradient = [&](float z, int i) { return expf(z - top) * factor - (i == target ? p.scale : 0.0f); };
    if (wide) {
        for (int i = begin + 4 * threadIdx.x; i < end; i += 4 * GLM_LOSS_THREADS) {
            Vec<float> z = Vec<float>::load(row + i);
            UNROLL
            for (int e = 0; e < 4; ++e) z.set(e, gradient(z.get(e), i + e));
            z.store(row + i);
        }
    } else {
        for (int i = begin + threadIdx.x; i < end; i += GLM_LOSS_THREADS) row[i] = gradient(row[i], i);
    }
}

/// One block, whose threads add up every 256th row, and then each other's sums by halves in shared memory:
/// 256 doubles.
// static: loss_sum threads=256 shared=2048
KERNEL(loss_sum, LossSum, GLM_LOSS_THREADS) {
    SHARED_MEMORY(double, sums);
    double sum = 0.0;
    for (int r = threadIdx.x; r < p.rows; r += GLM_LOSS_THREADS) {
        const float *s = p.statistics + 3 * int64_t(r);
        sum += double(s[0] + logf(s[1]) - s[2]);
    }
    sums[threadIdx.x] = sum;
    for (int half = GLM_LOSS_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *p.loss = sums[0];
}
