/// A wild load or store in a kernel, or a division by zero, becomes an error of the launch. The handler
/// itself only moves the thread to a spare stack: the signal's own may be too small, and the fiber's may be
/// what overflowed.
namespace emu {

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)

static struct sigaction former_actions[3];
static const int SIGNALS[3] = {SIGSEGV, SIGBUS, SIGFPE};

static void report_signal() {
    const char *address = static_cast<const char *>(the->fault_address);
    const Fiber *f = the->running;
    Place place = place_of(static_cast<const char *>(the->fault_pc) + 1);
    if (the->fault_signal == SIGFPE) emu_fail(nullptr, 0, "integer division by zero at %s", place.text);
    if (address >= f->stack - Fiber::GUARD && address < f->stack)
        emu_fail(nullptr, 0, "stack overflow: too much local memory per thread at %s", place.text);
    if (address >= the->shared_end && address < the->shared_end + Fiber::GUARD)
        emu_fail(nullptr, 0, "access past the end of %u bytes of shared memory at %s", the->shared_bytes,
                 place.text);
    emu_fail(nullptr, 0, "access to address %p, which is not mapped, at %s", the->fault_address, place.text);
}

static void on_signal(int number, siginfo_t *info, void *context) {
    if (the && the->active && the->running != &the->main) {
        ucontext_t *c = static_cast<ucontext_t *>(context);
        the->fault_signal = number;
        the->fault_address = info->si_addr;
        the->fault_pc = reinterpret_cast<void *>(c->uc_mcontext.gregs[REG_RIP]);
        c->uc_mcontext.gregs[REG_RIP] = greg_t(reinterpret_cast<uintptr_t>(&report_signal));
        c->uc_mcontext.gregs[REG_RSP] =
            greg_t(reinterpret_cast<uintptr_t>(the->spare_stack + sizeof the->spare_stack - 8));
        return;
    }
    // Not ours: let whoever had it before have it, by faulting again.
    for (int i = 0; i < 3; i++)
        if (SIGNALS[i] == number) sigaction(number, &former_actions[i], nullptr);
}

/// Once for the process; and for each operating-system thread a stack to handle an overflowed stack on.
static void catch_signals() {
    static bool installed = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &former_actions[i]);
        return true;
    }();
    (void)installed;
    stack_t now;
    if (sigaltstack(nullptr, &now) == 0 && (now.ss_flags & SS_DISABLE)) {
        stack_t own = {};
        own.ss_sp = the->signal_stack = static_cast<char *>(malloc(65536));
        own.ss_size = 65536;
        sigaltstack(&own, nullptr);
    }
}

static void free_signal_stack(Emulator *e) {
    if (!e->signal_stack) return;
    stack_t off = {};
    off.ss_flags = SS_DISABLE;
    sigaltstack(&off, nullptr);
    free(e->signal_stack);
    e->signal_stack = nullptr;
}

#else

static void catch_signals() {}
static void free_signal_stack(Emulator *) {}

#endif

} // namespace emu
