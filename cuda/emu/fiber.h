/// Fibers: stacks that the emulator switches between, one per blocked CUDA thread.
///
/// A fiber is not tied to a CUDA thread: it runs threads to their end one after another, and a thread that
/// never blocks costs no switch. Stacks are mapped once per operating-system thread and kept.
#ifndef GLM_EMU_FIBER_H
#define GLM_EMU_FIBER_H

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_SWITCH_ASM 1
#else
#include <ucontext.h>
#endif

namespace emu {

#if EMU_SWITCH_ASM
// void emu_switch(void **save, void *load): what the System V ABI wants preserved goes on the old stack.
asm(R"(
.text
.local emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
extern "C" void emu_switch(void **save, void *load) __asm__("emu_switch");
#endif

struct Fiber {
    static constexpr size_t STACK = 256 * 1024, GUARD = 64 * 1024;
    char *stack = nullptr; // lowest address; below it pages that fault, more of them than a frame has
    size_t size = 0;
    Fiber *next_free = nullptr;
#if EMU_SWITCH_ASM
    void *sp = nullptr;
#else
    ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void *fake_stack = nullptr;
#endif

    /// Maps a stack. The number spreads the stacks' tops over the cache's sets: all threads run the same
    /// frames.
    bool map(uint32_t number) {
        void *p = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) return false;
        mprotect(p, GUARD, PROT_NONE);
        stack = static_cast<char *>(p) + GUARD;
        size = STACK - (number * 37 % 1024) * 64;
        return true;
    }

    /// Makes the next switch to this fiber call `entry`, on an empty stack.
    void reset(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
        fake_stack = nullptr;
        __asan_unpoison_memory_region(stack, size);
#endif
#if EMU_SWITCH_ASM
        void **top = reinterpret_cast<void **>(stack + size);
        *--top = nullptr; // entry's return address, which nobody uses; the stack is aligned as after a call
        *--top = reinterpret_cast<void *>(entry);
        for (int i = 0; i < 6; i++) *--top = nullptr;
        sp = top;
#else
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
#endif
    }

    /// Leaves `from` (which may be continued later) for `to`.
    static void go(Fiber *from, Fiber *to) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->size);
#endif
#if EMU_SWITCH_ASM
        emu_switch(&from->sp, to->sp);
#else
        swapcontext(&from->context, &to->context);
#endif
        arrived(from);
    }

    /// The first thing to do on a stack after a switch.
    static void arrived(Fiber *here) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(here->fake_stack, nullptr, nullptr);
#else
        (void)here;
#endif
    }
};

} // namespace emu

#endif
