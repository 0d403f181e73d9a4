/// What the emulator's test kernels take.
#ifndef GLM_EMU_TESTS_H
#define GLM_EMU_TESTS_H

#include <stdint.h>

struct Words {
    uint32_t *y;
    const uint32_t *x;
    uint32_t *counter;
    uint32_t n;
};

/// The cases of test_mistakes.
enum Mistake {
    NO_MISTAKE,
    RETURNED_BEFORE_BARRIER,
    TWO_BARRIERS,
    NOT_IN_MASK,
    RETURNED_IN_MASK,
    TWO_COLLECTIVES,
    TWO_MASKS,
    WARP_AND_BLOCK,
    SHUFFLE_FROM_OUTSIDE,
    BAD_WIDTH,
    MMA_AT_TWO_LINES,
    COPY_TO_UNALIGNED,
    COPY_FROM_UNALIGNED,
    COPY_OUTSIDE,
    COPY_NEVER_WAITED,
    LDMATRIX_UNALIGNED,
    LDMATRIX_OUTSIDE,
    LOAD_UNALIGNED,
    ATOMIC_UNALIGNED,
    WRITE_JUST_PAST,
    WRITE_FAR_PAST,
    WILD_READ,
    WILD_WRITE,
    STACK_OVERFLOW,
    DIVISION_BY_ZERO,
    // Seen by the checker only.
    RACE_WRITE_READ,
    RACE_READ_WRITE,
    RACE_WRITE_WRITE,
    RACE_WITHOUT_SYNCWARP,
    RACE_PARTIAL_SYNCWARP,
    RACE_ATOMIC_AND_PLAIN,
    READ_UNWRITTEN,
    READ_COPY_IN_FLIGHT,
    READ_PAST_END,
};

#endif
