/// The state of one operating-system thread's emulator: the running block, its warps, threads and fibers.
#ifndef GLM_EMU_BLOCK_H
#define GLM_EMU_BLOCK_H

#include "builtins.h"
#include "fiber.h"
#include "numbers.h"

#include <vector>

namespace emu {

/// What the lanes of a warp do together; `finish` runs once all lanes of the mask are there.
struct Thread;
struct Operation {
    const char *name;
    bool aligned; // PTX .aligned: all 32 lanes, at the same instruction
    void (*finish)(Thread *lanes, uint32_t mask);
};

/// A cp.async copy in flight.
struct Copy {
    void *shared;
    const void *global; // null: zeros
    const char *file;
    int line;
    const void *pc;
};

enum class State : uint8_t { Unstarted, Running, AtWarp, AtBlock, Exited };

struct Thread {
    Index index;
    State state;
    uint8_t lane;
    uint8_t warp;
    uint32_t mask;
    const Operation *operation;
    void *operands; // on the thread's stack, which stays while it waits
    const char *file;
    int line;
    Fiber *fiber;
    // cp.async: copies[landed..] are in flight; group g ends before copies[ends[g]].
    std::vector<Copy> copies;
    std::vector<uint32_t> ends;
    uint32_t landed = 0, groups_landed = 0;
};

struct Warp {
    uint32_t present; // lanes that the block has
    uint32_t ready;   // may run in this turn
    uint32_t later;   // may run in the warp's next turn
    uint32_t waiting; // stand at a collective
    uint32_t exited;
    // Of the first that stands at a collective; mixed: somebody since stands at another.
    const Operation *operation;
    uint32_t mask;
    int line;
    bool mixed;
};

constexpr uint32_t MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32;
/// Room for dynamic shared memory: a multiple of the page size, as much as any target has.
constexpr size_t SHARED_MAPPED = 228 * 1024;
/// The default limit: the least among the targets from sm_80 on.
constexpr uint32_t SHARED_LIMIT = 99 * 1024;

struct Checker;

struct Emulator {
    Thread threads[MAX_THREADS];
    Warp warps[MAX_WARPS];
    Thread *current;
    uint32_t warp;     // whose turn it is
    uint32_t runnable; // bit p: the warp at position p has ready or later lanes
    uint32_t thread_count, warp_count, at_barrier, exited;
    const char *barrier_file; // of the threads that stand at the block barrier
    int barrier_line, barrier_combine, barrier_value;
    bool barrier_mixed;

    const Kernel *kernel;
    const void *params;
    bool active = false;

    Checker *checker = nullptr;
    Emulator *next_idle = nullptr;

    // Settings
    int schedule;
    uint32_t shared_limit;
    bool reverse, shuffled, deep, flip_copies;
    uint64_t random;

    char *shared_end = nullptr; // dynamic shared memory ends here (rounded up), at a page that faults
    uint32_t shared_bytes;

    Fiber main;
    std::vector<Fiber *> fibers;
    Fiber *free_fibers = nullptr;
    Fiber *running = nullptr;

    // A fault in a kernel: what the signal said, and stacks to say it on.
    void *fault_address, *fault_pc;
    int fault_signal;
    char *signal_stack = nullptr;
    alignas(16) char spare_stack[64 * 1024];

    bool failed = false;
    char *error;
    uint64_t error_len;

    uint64_t next_random() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return random;
    }
};

} // namespace emu

#endif
