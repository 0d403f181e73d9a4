/// The checker of dynamic shared memory: races, reads of bytes never written, accesses outside.
///
/// A build with -DEMU_CHECK compiles kernels with -fsanitize=thread and gives the compiler's __tsan_* calls
/// this meaning instead of libtsan's. Every byte remembers its last writer and its readers since. Two
/// accesses by different threads, one of them a write, must have between them a block barrier, or a
/// __syncwarp that both threads took part in. Shuffles, votes and matrix operations order no memory, as on
/// the device. Order through a third thread by partial masks is not followed.
namespace emu {

enum { PLAIN, ATOMIC, STARTED, LANDED }; // kinds of writes; STARTED: a cp.async in flight

#ifndef EMU_CHECK

struct Checker {};
static inline void check_block() {}
static inline void check_barrier() {}
static inline void check_sync_warp(uint32_t, uint32_t) {}
static inline void check_read(const void *, size_t, const void *) {}
static inline void check_write(const void *, size_t, const void *, int) {}

#else

struct Byte {
    uint64_t write_epoch, read_epoch; // 0: never
    uint32_t write_sync, read_sync;   // counts of the thread's warp
    uint16_t writer;
    uint8_t write_kind;
    uint8_t read_warp;   // SEVERAL: more than one
    uint32_t read_lanes; // of read_warp, since its last full __syncwarp
    const void *write_pc, *read_pc;
};
constexpr uint8_t SEVERAL = 255;

struct Checker {
    Byte bytes[SHARED_MAPPED] = {};
    uint64_t epoch = 0, block_epoch = 0; // barriers so far; at the start of this block
    uint32_t syncs[MAX_WARPS] = {};      // __syncwarps so far
    uint32_t full_sync[MAX_WARPS] = {};  // the count after the last with every lane
    uint32_t pair_sync[MAX_WARPS][32][32] = {};
};
static void check_block() {
    if (!the->checker) the->checker = new Checker;
    the->checker->block_epoch = ++the->checker->epoch;
}
static void check_barrier() { the->checker->epoch++; }

static void check_sync_warp(uint32_t warp, uint32_t mask) {
    uint32_t count = ++the->checker->syncs[warp];
    if (mask == the->warps[warp].present) {
        the->checker->full_sync[warp] = count;
        return;
    }
    for (uint32_t i = 0; i < 32; i++)
        for (uint32_t j = 0; j < 32; j++)
            if (mask >> i & mask >> j & 1) the->checker->pair_sync[warp][i][j] = count;
}

/// Whether an access of `lane` of the same warp, made when the warp's count was `sync`, is ordered before
/// `me`.
static bool ordered(uint32_t lane, uint32_t sync, const Thread *me) {
    return lane == me->lane || sync < the->checker->full_sync[me->warp] ||
           sync < the->checker->pair_sync[me->warp][lane][me->lane];
}

[[noreturn]] static void race(const char *first, uint32_t thread, const void *first_pc, const char *second,
                              const void *pc, size_t at) {
    emu_fail(
        nullptr, 0,
        "race on byte %zu of shared memory: %s at %s and %s by thread %u at %s have no barrier between them",
        at, second, place_of(pc).text, first, thread, place_of(first_pc).text);
}

/// The byte at p, or null when it is no shared memory at all.
static Byte *find_bytes(const void *p, size_t n, const void *pc, const char *what) {
    if (!the || !the->active || !the->checker) return nullptr;
    const char *at = static_cast<const char *>(p), *base = static_cast<char *>(emu_here.shared);
    const char *map = the->shared_end - SHARED_MAPPED;
    if (at < map || at >= the->shared_end) return nullptr;
    if (at < base || at + n > base + the->shared_bytes)
        emu_fail(nullptr, 0, "%s of bytes %lld to %lld of %u bytes of shared memory at %s", what,
                 (long long)(at - base), (long long)(at - base + n), the->shared_bytes, place_of(pc).text);
    return the->checker->bytes + (at - base);
}

static void check_read(const void *p, size_t n, const void *pc) {
    Byte *b = find_bytes(p, n, pc, "read");
    if (!b) return;
    const Thread *me = the->current;
    for (Byte *end = b + n; b < end; b++) {
        size_t at = size_t(b - the->checker->bytes);
        if (b->write_epoch < the->checker->block_epoch)
            emu_fail(nullptr, 0, "read of byte %zu of shared memory, which was never written, at %s", at,
                     place_of(pc).text);
        if (b->write_kind == STARTED)
            race("a cp.async still in flight", b->writer, b->write_pc, "a read", pc, at);
        if (b->write_epoch == the->checker->epoch &&
            (b->writer / 32 != me->warp || !ordered(b->writer % 32, b->write_sync, me)))
            race("a write", b->writer, b->write_pc, "a read", pc, at);
        if (b->read_epoch != the->checker->epoch) {
            b->read_warp = me->warp;
            b->read_lanes = 0;
        } else if (b->read_warp != me->warp) {
            b->read_warp = SEVERAL;
        } else if (b->read_sync < the->checker->full_sync[me->warp]) {
            b->read_lanes = 0;
        }
        b->read_epoch = the->checker->epoch;
        b->read_sync = the->checker->syncs[me->warp];
        b->read_lanes |= 1u << me->lane;
        b->read_pc = pc;
    }
}

static void check_write(const void *p, size_t n, const void *pc, int kind) {
    Byte *b = find_bytes(p, n, pc, "write");
    if (!b) return;
    const Thread *me = the->current;
    uint16_t thread = uint16_t(me - the->threads);
    for (Byte *end = b + n; b < end; b++) {
        size_t at = size_t(b - the->checker->bytes);
        bool mine = b->writer == thread && kind == LANDED;
        if (b->write_epoch >= the->checker->block_epoch && b->write_kind == STARTED && !mine)
            race("a cp.async still in flight", b->writer, b->write_pc, "a write", pc, at);
        if (b->write_epoch == the->checker->epoch && !(kind == ATOMIC && b->write_kind == ATOMIC) &&
            (b->writer / 32 != me->warp || !ordered(b->writer % 32, b->write_sync, me)))
            race("a write", b->writer, b->write_pc, "a write", pc, at);
        if (b->read_epoch == the->checker->epoch) {
            if (b->read_warp != me->warp)
                race("a read", b->read_warp == SEVERAL ? 0 : b->read_warp * 32u, b->read_pc, "a write", pc,
                     at);
            for (uint32_t lanes = b->read_lanes; lanes; lanes &= lanes - 1) {
                uint32_t lane = uint32_t(__builtin_ctz(lanes));
                if (!ordered(lane, b->read_sync, me))
                    race("a read", me->warp * 32u + lane, b->read_pc, "a write", pc, at);
            }
        }
        b->write_epoch = the->checker->epoch;
        b->write_sync = the->checker->syncs[me->warp];
        b->writer = thread;
        b->write_kind = uint8_t(kind);
        b->write_pc = pc;
    }
}

#endif

} // namespace emu

#ifdef EMU_CHECK

#define PC __builtin_return_address(0)
#define EMU_TSAN(n)                                                                                          \
    void __tsan_read##n(void *p) { check_read(p, n, PC); }                                                   \
    void __tsan_write##n(void *p) { check_write(p, n, PC, PLAIN); }                                          \
    void __tsan_unaligned_read##n(void *p) { check_read(p, n, PC); }                                         \
    void __tsan_unaligned_write##n(void *p) { check_write(p, n, PC, PLAIN); }
extern "C" {
using namespace emu;
EMU_TSAN(1)
EMU_TSAN(2)
EMU_TSAN(4)
EMU_TSAN(8)
EMU_TSAN(16)
void __tsan_read_range(void *p, size_t n) { check_read(p, n, PC); }
void __tsan_write_range(void *p, size_t n) { check_write(p, n, PC, PLAIN); }
void __tsan_vptr_read(void **) {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#undef EMU_TSAN
#undef PC

#endif
