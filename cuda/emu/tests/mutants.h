/// The planted bugs, and what the kernels that have them take.
#ifndef GLM_EMU_MUTANTS_H
#define GLM_EMU_MUTANTS_H

#include <stdint.h>

#define MISSING_BARRIER_AFTER_REDUCTION 1
#define MISSING_BARRIER_BEFORE_READ 2
#define MISSING_BARRIER_BEFORE_REFILL 3
#define MISSING_WAIT 4
#define WAIT_OFF_BY_ONE 5
#define OFF_BY_ONE 6
#define WRONG_LANE_MAP 7
#define MISSING_SYNCWARP 8
#define MUTANTS 8

struct MutantReduce {
    float *y;
    const float *x;
    uint32_t n;
};

struct MutantGemm {
    float *c;
    const void *a, *b;
    int32_t m, n, k;
};

#endif
