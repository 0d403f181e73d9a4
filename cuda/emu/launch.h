/// A launch: checks, a place for shared memory, the first switch; and the settings.
namespace emu {

/// Emulators whose threads have ended. Never freed: a test runner starts a thread per test, and each would
/// map its stacks anew.
static Emulator *idle;
static std::mutex idle_lock;

Owner::~Owner() {
    if (!emulator) return;
    free_signal_stack(emulator);
    the = nullptr;
    std::lock_guard<std::mutex> guard(idle_lock);
    emulator->next_idle = idle;
    idle = emulator;
}

/// This operating-system thread's emulator, found on first use.
static Emulator *mine() {
    if (the) return the;
    {
        std::lock_guard<std::mutex> guard(idle_lock);
        if (idle) {
            the = idle;
            idle = idle->next_idle;
        }
    }
    if (!the) {
        the = new Emulator;
        for (uint32_t i = 0; i < MAX_THREADS; i++) {
            the->threads[i].lane = uint8_t(i % 32);
            the->threads[i].warp = uint8_t(i / 32);
            the->threads[i].fiber = nullptr;
        }
    }
    const char *schedule = getenv("GLMTUNE_EMU_SCHEDULE");
    the->schedule = schedule ? std::max(0, atoi(schedule)) : 0;
    the->shared_limit = SHARED_LIMIT;
    owner.emulator = the;
    catch_signals();
    return the;
}

static int refuse(const char *kernel, char *error, uint64_t error_len, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static int refuse(const char *kernel, char *error, uint64_t error_len, const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (error && error_len) snprintf(error, error_len, "%s: %s", kernel, text);
    return 1;
}

static const Kernel *find_kernel(const char *name) {
    static thread_local const Kernel *last;
    if (last && !strcmp(last->name, name)) return last;
    for (const Kernel *k = first_kernel; k; k = k->next)
        if (!strcmp(k->name, name)) return last = k;
    return nullptr;
}

static void end_block() {
    const char *end = static_cast<char *>(emu_here.shared) + the->shared_bytes;
    for (const char *p = end; p < the->shared_end; p++)
        if (*p != char(0xFF))
            emu_fail(nullptr, 0, "a write past the end of %u bytes of shared memory", the->shared_bytes);
}

} // namespace emu

extern "C" int emu_launch(const char *kernel, const uint32_t grid[3], const uint32_t block[3],
                          uint32_t shared_bytes, const void *params, uint64_t params_bytes, char *error,
                          uint64_t error_len) {
    if (error && error_len) error[0] = 0;
    const Substitute &other = substitute();
    if (!other.problem.empty()) return refuse(kernel, error, error_len, "%s", other.problem.c_str());
    if (other.launch) {
        int code = other.launch(kernel, grid, block, shared_bytes, params, params_bytes, error, error_len);
        if (code != NO_SUCH_KERNEL) return code;
        if (error && error_len) error[0] = 0;
    }
    Emulator *e = mine();
    const Kernel *k = find_kernel(kernel);
    if (!k) {
        refuse(kernel, error, error_len, "no such kernel");
        return NO_SUCH_KERNEL;
    }
    if (e->active) return refuse(kernel, error, error_len, "launched from inside a kernel");
    if (params_bytes != k->params_bytes)
        return refuse(kernel, error, error_len, "parameters have %llu bytes, the kernel takes %llu",
                      (unsigned long long)params_bytes, (unsigned long long)k->params_bytes);
    uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
    if (threads == 0 || threads > MAX_THREADS || block[2] > 64)
        return refuse(kernel, error, error_len,
                      "a block of %u x %u x %u threads; 1 to 1024 can run, z up to 64", block[0], block[1],
                      block[2]);
    if (threads > k->max_threads)
        return refuse(kernel, error, error_len, "%llu threads per block; it is compiled for at most %u",
                      (unsigned long long)threads, k->max_threads);
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7FFFFFFFu || grid[1] > 65535 || grid[2] > 65535)
        return refuse(kernel, error, error_len,
                      "a grid of %u x %u x %u blocks; none may be 0, y and z go up to 65535", grid[0],
                      grid[1], grid[2]);
    if (shared_bytes > e->shared_limit)
        return refuse(kernel, error, error_len, "%u bytes of shared memory; the limit is %u", shared_bytes,
                      e->shared_limit);
    if (!e->shared_end) {
        void *p = mmap(nullptr, SHARED_MAPPED + Fiber::GUARD, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) return refuse(kernel, error, error_len, "no memory for shared memory");
        e->shared_end = static_cast<char *>(p) + SHARED_MAPPED;
        mprotect(e->shared_end, Fiber::GUARD, PROT_NONE);
    }

    e->reverse = e->schedule == 1;
    e->shuffled = e->schedule >= 2;
    e->deep = e->schedule & 1;
    e->flip_copies = e->shuffled && e->deep;
    e->random = 0x9E3779B97F4A7C15u * uint64_t(e->schedule + 1);
    e->kernel = k;
    e->params = params;
    e->error = error;
    e->error_len = error_len;
    e->failed = false;
    e->thread_count = uint32_t(threads);
    e->warp_count = uint32_t((threads + 31) / 32);
    e->shared_bytes = shared_bytes;
    emu_here.shared = e->shared_end - (shared_bytes + 127) / 128 * 128;
    emu_here.block_dim = {block[0], block[1], block[2]};
    emu_here.grid_dim = {grid[0], grid[1], grid[2]};
    emu_here.block = {0, 0, 0};
    Thread *t = e->threads;
    for (uint32_t z = 0; z < block[2]; z++)
        for (uint32_t y = 0; y < block[1]; y++)
            for (uint32_t x = 0; x < block[0]; x++) (t++)->index = {x, y, z};

    e->active = true;
    e->running = &e->main;
    begin_block();
    make_current(next_thread());
    go_to(take_fiber());
    e->active = false;
    if (!e->failed) return 0;
    // Threads were left in the middle: their fibers and copies start afresh.
    e->free_fibers = nullptr;
    for (Fiber *f : e->fibers) {
        f->reset(fiber_main);
        give_fiber(f);
    }
    for (Thread &thread : e->threads) {
        thread.copies.clear();
        thread.ends.clear();
        thread.landed = thread.groups_landed = 0;
    }
    return 1;
}

extern "C" void emu_set_schedule(int schedule) { mine()->schedule = schedule < 0 ? 0 : schedule; }

extern "C" void emu_set_limits(uint32_t shared_bytes) {
    mine()->shared_limit = shared_bytes < SHARED_MAPPED ? shared_bytes : uint32_t(SHARED_MAPPED);
}

extern "C" uint32_t emu_kernel_count(void) {
    uint32_t n = 0;
    for (const Kernel *k = first_kernel; k; k = k->next) n++;
    return n;
}

extern "C" const char *emu_kernel_name(uint32_t i) {
    const Kernel *k = first_kernel;
    while (k && i--) k = k->next;
    return k ? k->name : "";
}
