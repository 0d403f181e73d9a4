/// Runs a grid: blocks one after another, a block's threads on fibers, warp by warp.
///
/// Rules that everything here follows:
/// * A thread runs until it stands at a collective or a barrier that others have not reached, or until it
/// returns.
/// * The last thread to arrive does the work of all, so a collective costs one switch per lane.
/// * Nothing aborts: emu_fail writes the message and leaves every fiber for good.
#include "emu.h"

#include "block.h"

#include <algorithm>
#include <dlfcn.h>
#include <mutex>
#include <new>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string>
#include <ucontext.h>
#include <unistd.h>

__thread __attribute__((tls_model("initial-exec"))) emu::Here emu_here;

namespace emu {

static Kernel *first_kernel;

Kernel::Kernel(const char *name, void (*run)(const void *), uint64_t params_bytes, uint32_t max_threads)
    : name(name), run(run), params_bytes(params_bytes), max_threads(max_threads), next(first_kernel) {
    first_kernel = this;
}

static __thread __attribute__((tls_model("initial-exec"))) Emulator *the;

/// Takes an operating-system thread's emulator back when the thread ends, for the next thread that wants one.
struct Owner {
    Emulator *emulator = nullptr;
    ~Owner();
};
static thread_local Owner owner;

static void leave();

} // namespace emu

#include "report.h"
#include "place.h"
#include "signals.h"
#include "check.h"
#include "schedule.h"
#include "collectives.h"
#include "copies.h"
#include "substitute.h"
#include "launch.h"
