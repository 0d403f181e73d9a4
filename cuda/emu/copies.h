/// cp.async: a queue per thread. A copy lands as late as its wait allows, so that a missing wait shows as
/// NaN; in some shuffled schedules half of the copies land at once, so that a too early overwrite shows.
namespace emu {

static void put(const Copy &c) {
    if (c.global)
        memcpy(c.shared, c.global, 16);
    else
        memset(c.shared, 0, 16);
}

static void land(const Copy &c) {
    check_write(c.shared, 16, c.pc, LANDED);
    put(c);
}

} // namespace emu

extern "C" void emu_cp_async_16(void *shared, const void *global, bool valid, const char *file, int line) {
    Thread *me = the->current;
    need_shared(shared, 16, "cp.async", file, line);
    if (valid && reinterpret_cast<uintptr_t>(global) % 16)
        emu_fail(file, line, "cp.async: global address %p is not aligned to 16", global);
    if (valid && !global) emu_fail(file, line, "cp.async: null global address");
    Copy c{shared, valid ? global : nullptr, file, line, __builtin_return_address(0)};
    check_write(shared, 16, c.pc, STARTED);
    if (the->flip_copies && (the->next_random() & 1)) put(c);
    me->copies.push_back(c);
}

extern "C" void emu_cp_async_commit(void) {
    Thread *me = the->current;
    me->ends.push_back(uint32_t(me->copies.size()));
}

extern "C" void emu_cp_async_wait(int groups) {
    Thread *me = the->current;
    uint32_t total = uint32_t(me->ends.size());
    uint32_t done = total > uint32_t(groups) ? total - uint32_t(groups) : 0;
    if (done <= me->groups_landed) return;
    for (uint32_t end = me->ends[done - 1]; me->landed < end; me->landed++) land(me->copies[me->landed]);
    me->groups_landed = done;
    if (done == total && me->landed == me->copies.size()) { // nothing in flight: start over, keep the memory
        me->copies.clear();
        me->ends.clear();
        me->landed = me->groups_landed = 0;
    }
}
