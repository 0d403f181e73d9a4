/// Who runs next, and the life of a block.
namespace emu {

/// Position of a warp in the order of turns, and back (the map is its own inverse).
static inline uint32_t position(uint32_t warp) { return the->reverse ? the->warp_count - 1 - warp : warp; }

static inline void mark_runnable(uint32_t warp) { the->runnable |= 1u << position(warp); }

/// Lanes that may go on: in this turn (depth first) or in the warp's next (breadth first).
static inline void release(uint32_t warp, uint32_t lanes) {
    (the->deep ? the->warps[warp].ready : the->warps[warp].later) |= lanes;
    if (lanes) mark_runnable(warp);
}

static inline uint32_t pick_bit(uint32_t bits) {
    if (the->shuffled) {
        uint32_t by = the->next_random() & 31u;
        uint32_t turned = bits >> by | (by ? bits << (32 - by) : 0);
        return (__builtin_ctz(turned) + by) & 31u;
    }
    return __builtin_ctz(bits);
}

/// The next thread to run, taken off its warp's list; null when every thread waits or has returned.
static Thread *next_thread() {
    Warp *w = &the->warps[the->warp];
    if (!w->ready) {
        uint32_t here = position(the->warp);
        if (!w->later) the->runnable &= ~(1u << here);
        uint32_t bits = the->runnable;
        if (!bits) return nullptr;
        if (!the->shuffled && !the->deep) { // breadth first: on to the next warp of the round
            uint32_t after = here == 31 ? 0 : bits & ~0u << (here + 1);
            if (after) bits = after;
        }
        the->warp = position(pick_bit(bits));
        w = &the->warps[the->warp];
        w->ready |= w->later;
        w->later = 0;
    }
    uint32_t lane = the->reverse ? 31 - __builtin_clz(w->ready) : pick_bit(w->ready);
    w->ready &= ~(1u << lane);
    return &the->threads[the->warp * 32 + lane];
}

static void fiber_main();

static Fiber *take_fiber() {
    Fiber *f = the->free_fibers;
    if (f) {
        the->free_fibers = f->next_free;
        return f;
    }
    f = new Fiber;
    if (!f->map(uint32_t(the->fibers.size()))) {
        delete f;
        emu_fail(nullptr, 0, "no memory for another thread's stack");
    }
    f->reset(fiber_main);
    the->fibers.push_back(f);
    return f;
}

static inline void give_fiber(Fiber *f) {
    f->next_free = the->free_fibers;
    the->free_fibers = f;
}

static inline void make_current(Thread *t) {
    the->current = t;
    t->state = State::Running;
    emu_here.thread = t->index;
}

static inline void go_to(Fiber *f) {
    Fiber *from = the->running;
    the->running = f;
    Fiber::go(from, f);
}

/// Back to the launcher for good: nothing here is continued.
static void leave() { go_to(&the->main); }

/// Nobody can go on, and not all have returned: says why.
[[noreturn]] static void report_stuck() {
    const Thread *at = the->threads, *other = nullptr;
    while (at->state == State::Exited) at++;
    for (uint32_t i = 0; i < the->thread_count; i++) {
        const Thread &t = the->threads[i];
        if (t.state == State::AtBlock && at->state == State::AtBlock &&
            (t.line != at->line || strcmp(t.file, at->file)))
            other = &t;
    }
    const char *why = other ? "threads of a block stand at different barriers"
                      : the->at_barrier + the->exited == the->thread_count
                          ? "a barrier that some threads never reach, having returned"
                          : "deadlock";
    emu_here.thread = at->index;
    fail_with(at->file, at->line, why, true);
}

/// Runs others until somebody makes this thread ready again.
static void suspend() {
    Thread *me = the->current;
    Thread *next = next_thread();
    if (!next) report_stuck();
    if (next == me) { // ready again at once
        make_current(me);
        return;
    }
    bool fresh = next->state == State::Unstarted;
    make_current(next);
    go_to(fresh ? take_fiber() : next->fiber);
}

static void begin_block() {
    uint32_t n = the->thread_count;
    the->at_barrier = the->exited = 0;
    for (uint32_t i = 0; i < the->warp_count; i++) {
        uint32_t lanes = std::min(32u, n - 32 * i);
        Warp &w = the->warps[i];
        w.present = lanes == 32 ? ~0u : (1u << lanes) - 1;
        w.ready = w.present;
        w.later = w.waiting = w.exited = 0;
    }
    for (uint32_t i = 0; i < n; i++) the->threads[i].state = State::Unstarted;
    the->runnable = the->warp_count == 32 ? ~0u : (1u << the->warp_count) - 1;
    the->warp = position(the->shuffled ? pick_bit(the->runnable) : 0);
    check_block();
    // NaN in every float type, so that a value never written shows.
    memset(emu_here.shared, 0xFF, the->shared_end - static_cast<char *>(emu_here.shared));
}

static void end_block();

/// The next block of the grid; false after the last.
static bool next_block() {
    Index &b = emu_here.block, g = emu_here.grid_dim;
    if (++b.x < g.x) return true;
    b.x = 0;
    if (++b.y < g.y) return true;
    b.y = 0;
    return ++b.z < g.z;
}

/// Ends the current thread; the next one to run, or null when the grid is done.
static Thread *thread_returned() {
    Thread *me = the->current;
    me->state = State::Exited;
    me->fiber = nullptr;
    the->exited++;
    the->warps[me->warp].exited |= 1u << me->lane;
    if (me->ends.size() > me->groups_landed || me->copies.size() > me->landed) {
        if (me->copies.size() > me->landed) {
            const Copy &c = me->copies[me->landed];
            emu_fail(c.file, c.line, "cp.async started here was never waited for");
        }
    }
    me->copies.clear();
    me->ends.clear();
    me->landed = me->groups_landed = 0;
    Thread *next = next_thread();
    if (next) return next;
    if (the->exited < the->thread_count) report_stuck();
    end_block();
    if (!next_block()) return nullptr;
    begin_block();
    return next_thread();
}

static void fiber_main() {
    Fiber *self = the->running;
    Fiber::arrived(self);
    for (;;) {
        the->current->fiber = self;
        the->kernel->run(the->params);
        Thread *next = thread_returned();
        if (!next) {
            give_fiber(self);
            leave(); // and be continued in a later launch
            continue;
        }
        bool fresh = next->state == State::Unstarted;
        make_current(next);
        if (!fresh) {
            give_fiber(self);
            go_to(next->fiber);
        }
    }
}

} // namespace emu

extern "C" int emu_sync_threads(int combine, int value, const char *file, int line) {
    using namespace emu;
    Thread *me = the->current;
    me->file = file;
    me->line = line;
    me->state = State::AtBlock;
    if (the->at_barrier == 0) {
        the->barrier_file = file;
        the->barrier_line = line;
        the->barrier_combine = combine == EMU_AND;
        the->barrier_mixed = false;
    } else if (the->barrier_line != line || strcmp(the->barrier_file, file)) {
        the->barrier_mixed =
            true; // reported when nobody can go on, so that the report shows where everybody ended
    }
    if (combine == EMU_COUNT) the->barrier_combine += value != 0;
    if (combine == EMU_AND) the->barrier_combine &= value != 0;
    if (combine == EMU_OR) the->barrier_combine |= value != 0;
    if (++the->at_barrier < the->thread_count || the->barrier_mixed) {
        suspend();
        return the->barrier_value;
    }
    check_barrier();
    the->at_barrier = 0;
    the->barrier_value = the->barrier_combine;
    for (uint32_t i = 0; i < the->warp_count; i++) release(i, the->warps[i].present);
    if (the->deep && !the->shuffled) { // the last one runs on
        the->warps[me->warp].ready &= ~(1u << me->lane);
        me->state = State::Running;
    } else {
        suspend();
    }
    return the->barrier_value;
}
