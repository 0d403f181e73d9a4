/// The emulator as its caller sees it: kernels by name, a launch, settings. Plain C, so that Rust can call
/// it.
///
/// Every operating-system thread has an emulator of its own; any number of them may launch at the same time.
#ifndef GLM_EMU_H
#define GLM_EMU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/// Runs `kernel` over grid x block threads with `shared_bytes` of dynamic shared memory. Returns 0, or 1 (2:
/// there is no such kernel) and a message of at most error_len - 1 bytes. After an error the contents of
/// outputs are unspecified.
int emu_launch(const char *kernel, const uint32_t grid[3], const uint32_t block[3], uint32_t shared_bytes,
               const void *params, uint64_t params_bytes, char *error, uint64_t error_len);

/// The order in which later launches of this thread run warps and lanes. 0: forward, breadth first (a warp
/// runs to its next collective). 1: reverse, depth first (a warp runs to the next block barrier). From 2:
/// shuffled, seeded with the number, depth first if odd; then half of the cp.async copies land at once
/// instead of as late as they may. Default: the environment's GLMTUNE_EMU_SCHEDULE, or 0.
void emu_set_schedule(int schedule);

/// Most dynamic shared memory a block may ask for in later launches of this thread. Default 99 KB, the least
/// among the targets from sm_80 on; Turing has 64 KB.
void emu_set_limits(uint32_t shared_bytes);

/// Number of registered kernels; name of the i-th.
uint32_t emu_kernel_count(void);
const char *emu_kernel_name(uint32_t i);

#ifdef __cplusplus
}
#endif

#endif
