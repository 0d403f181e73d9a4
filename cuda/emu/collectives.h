/// What the lanes of a warp do together: shuffles, votes, matrix fragments.
namespace emu {

/// Stands at a collective until all lanes of `mask` do; then one of them finishes it for all.
static void collective(const Operation *operation, uint32_t mask, void *operands, const char *file,
                       int line) {
    Thread *me = the->current;
    Warp *w = &the->warps[me->warp];
    uint32_t bit = 1u << me->lane;
    me->operation = operation;
    me->mask = mask;
    me->operands = operands;
    me->file = file;
    me->line = line;
    me->state = State::AtWarp;
    if (!(mask & bit))
        emu_fail(file, line, "%s: lane %u is not in its own mask %08x", operation->name, me->lane, mask);
    if (mask & ~w->present)
        emu_fail(file, line, "%s: mask %08x names lanes that the block does not have (%u threads)",
                 operation->name, mask, the->thread_count);
    if (mask & w->exited)
        fail_threads(file, line, "%s: mask %08x names lanes that have returned", operation->name, mask);
    if (!w->waiting) {
        w->operation = operation;
        w->mask = mask;
        w->line = line;
        w->mixed = false;
    } else if (w->operation != operation || w->mask != mask || w->line != line) {
        w->mixed = true;
    }
    w->waiting |= bit;
    if ((w->waiting & mask) != mask) {
        suspend();
        return;
    }
    Thread *lanes = me - me->lane;
    for (uint32_t rest = w->mixed ? mask & ~bit : 0; rest; rest &= rest - 1) {
        const Thread &other = lanes[__builtin_ctz(rest)];
        if (other.operation != operation || other.mask != mask || (operation->aligned && other.line != line))
            fail_threads(file, line, "%s: lanes of one mask are at different collectives", operation->name);
    }
    operation->finish(lanes, mask);
    w->waiting &= ~mask;
    release(me->warp, mask & ~bit);
    me->state = State::Running;
}

static void finish_sync(Thread *lanes, uint32_t mask) { check_sync_warp(lanes->warp, mask); }

struct Shuffle {
    uint64_t value, result;
    int kind, lane, width;
};

static void finish_shuffle(Thread *lanes, uint32_t mask) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        uint32_t l = __builtin_ctz(rest);
        Shuffle &s = *static_cast<Shuffle *>(lanes[l].operands);
        int width = s.width, first = int(l) & ~(width - 1), last = first + width - 1, from = int(l);
        switch (s.kind) {
        case EMU_INDEX: from = first + (s.lane & (width - 1)); break;
        case EMU_XOR: // a lane of a later group is out of reach; one of an earlier group is not
            from = int(l) ^ s.lane;
            if (from > last) from = int(l);
            break;
        case EMU_DOWN: from = int(l) + s.lane > last ? int(l) : int(l) + s.lane; break;
        case EMU_UP: from = int(l) - s.lane < first ? int(l) : int(l) - s.lane; break;
        }
        if (!(mask >> from & 1))
            emu_fail(lanes[l].file, lanes[l].line,
                     "shuffle: lane %u reads lane %d, which is not in mask %08x", l, from, mask);
        s.result = static_cast<Shuffle *>(lanes[from].operands)->value;
    }
}

struct Vote {
    bool predicate;
    uint32_t result;
};

static void finish_vote(Thread *lanes, uint32_t mask) {
    uint32_t result = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        uint32_t l = __builtin_ctz(rest);
        if (static_cast<Vote *>(lanes[l].operands)->predicate) result |= 1u << l;
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1)
        static_cast<Vote *>(lanes[__builtin_ctz(rest)].operands)->result = result;
}

struct LdMatrix {
    uint32_t *r;
    const void *row;
    int tiles;
    bool transposed;
};

static void finish_ldmatrix(Thread *lanes, uint32_t) {
    auto of = [&](uint32_t l) -> LdMatrix & { return *static_cast<LdMatrix *>(lanes[l].operands); };
    for (int tile = 0; tile < of(0).tiles; tile++) {
        uint16_t m[8][8];
        for (int row = 0; row < 8; row++) memcpy(m[row], of(uint32_t(tile * 8 + row)).row, 16);
        for (uint32_t l = 0; l < 32; l++) {
            uint32_t g = l / 4, t = 2 * (l % 4);
            of(l).r[tile] = of(l).transposed ? m[t][g] | uint32_t(m[t + 1][g]) << 16
                                             : m[g][t] | uint32_t(m[g][t + 1]) << 16;
        }
    }
}

struct MmaOperands {
    float *d;
    const uint32_t *a, *b;
};

typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Bits4 __attribute__((vector_size(16)));

/// half_to_float or bf16_to_float of four.
template <bool BF16> static inline Float4 widen(Bits4 h) {
    if (BF16) return Float4(h << 16);
    Bits4 magnitude = h & 0x7FFFu, moved = magnitude << 13;
    Bits4 special = Bits4(magnitude >= 0x7C00u) & 0x38000000u;
    Bits4 subnormal = Bits4(Float4(moved + 0x38800000u) - 0x1p-14f), small = Bits4(magnitude < 0x0400u);
    Bits4 v = moved + 0x38000000u + special;
    return Float4((subnormal & small) | (v & ~small) | (h & 0x8000u) << 16);
}

template <bool BF16> static void finish_mma(Thread *lanes, uint32_t) {
    // Rows as they are in the matrices: a[m][k / 2] and b[n][k / 2] are pairs, d[m][n].
    alignas(16) uint32_t a[16][8], b[8][8];
    alignas(16) float d[16][8], wide_a[16][16], wide_b[8][16];
    for (uint32_t l = 0; l < 32; l++) {
        const MmaOperands &o = *static_cast<MmaOperands *>(lanes[l].operands);
        uint32_t g = l / 4, t = l % 4;
        a[g][t] = o.a[0], a[g + 8][t] = o.a[1], a[g][t + 4] = o.a[2], a[g + 8][t + 4] = o.a[3];
        b[g][t] = o.b[0], b[g][t + 4] = o.b[1];
        memcpy(&d[g][2 * t], o.d, 8);
        memcpy(&d[g + 8][2 * t], o.d + 2, 8);
    }
    // Even k in the first half of a row, odd k in the second.
    auto widen_row = [](const uint32_t *from, float *to) {
        for (int i = 0; i < 8; i += 4) {
            Bits4 pair;
            memcpy(&pair, from + i, 16);
            Float4 even = widen<BF16>(pair & 0xFFFFu), odd = widen<BF16>(pair >> 16);
            memcpy(to + i, &even, 16);
            memcpy(to + 8 + i, &odd, 16);
        }
    };
    for (int m = 0; m < 16; m++) widen_row(a[m], wide_a[m]);
    for (int n = 0; n < 8; n++) widen_row(b[n], wide_b[n]);
    Float4 columns[16][2]; // of b: columns[k] has all n
    for (int k = 0; k < 16; k++) {
        int i = k / 2 + k % 2 * 8;
        columns[k][0] = Float4{wide_b[0][i], wide_b[1][i], wide_b[2][i], wide_b[3][i]};
        columns[k][1] = Float4{wide_b[4][i], wide_b[5][i], wide_b[6][i], wide_b[7][i]};
    }
    for (int m = 0; m < 16; m += 2) { // four sums at a time hide the latency of additions
        Float4 sums[4];
        memcpy(sums, d[m], sizeof sums);
        for (int k = 0; k < 16; k++) {
            int i = k / 2 + k % 2 * 8;
            sums[0] += wide_a[m][i] * columns[k][0];
            sums[1] += wide_a[m][i] * columns[k][1];
            sums[2] += wide_a[m + 1][i] * columns[k][0];
            sums[3] += wide_a[m + 1][i] * columns[k][1];
        }
        memcpy(d[m], sums, sizeof sums);
    }
    for (uint32_t l = 0; l < 32; l++) {
        float *to = static_cast<MmaOperands *>(lanes[l].operands)->d;
        uint32_t g = l / 4, t = 2 * (l % 4);
        memcpy(to, &d[g][t], 8);
        memcpy(to + 2, &d[g + 8][t], 8);
    }
}

static const Operation SYNC{"__syncwarp", false, finish_sync};
static const Operation VOTE{"a vote", false, finish_vote};
static const Operation SHUFFLES[4] = {{"__shfl_sync", false, finish_shuffle},
                                      {"__shfl_xor_sync", false, finish_shuffle},
                                      {"__shfl_down_sync", false, finish_shuffle},
                                      {"__shfl_up_sync", false, finish_shuffle}};
static const Operation LDMATRIX[2][2] = {
    {{"ldmatrix x2", true, finish_ldmatrix}, {"ldmatrix x4", true, finish_ldmatrix}},
    {{"ldmatrix x2 trans", true, finish_ldmatrix}, {"ldmatrix x4 trans", true, finish_ldmatrix}}};
static const Operation MMA[2] = {{"mma f16", true, finish_mma<false>}, {"mma bf16", true, finish_mma<true>}};

/// Stops unless [p, p + bytes) is dynamic shared memory, aligned to `bytes`.
static inline void need_shared(const void *p, uint32_t bytes, const char *what, const char *file, int line) {
    uintptr_t at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(emu_here.shared);
    if (at % bytes) emu_fail(file, line, "%s: shared address %p is not aligned to %u", what, p, bytes);
    if (at < base || at + bytes > base + the->shared_bytes)
        emu_fail(file, line, "%s: bytes %lld to %lld of %u bytes of shared memory", what,
                 (long long)(at - base), (long long)(at - base + bytes), the->shared_bytes);
}

} // namespace emu

using namespace emu;

extern "C" void emu_sync_warp(uint32_t mask, const char *file, int line) {
    collective(&SYNC, mask, nullptr, file, line);
}

extern "C" uint64_t emu_shuffle(int kind, uint32_t mask, uint64_t value, int lane, int width,
                                const char *file, int line) {
    if (width < 1 || width > 32 || (width & (width - 1)))
        emu_fail(file, line, "shuffle: width %d is not a power of two", width);
    Shuffle s{value, 0, kind, lane, width};
    collective(&SHUFFLES[kind], mask, &s, file, line);
    return s.result;
}

extern "C" uint32_t emu_ballot(uint32_t mask, bool predicate, const char *file, int line) {
    Vote v{predicate, 0};
    collective(&VOTE, mask, &v, file, line);
    return v.result;
}

extern "C" void emu_ldmatrix(uint32_t *r, const void *row, int tiles, bool transposed, const char *file,
                             int line) {
    const Operation *operation = &LDMATRIX[transposed][tiles == 4];
    if (the->current->lane < tiles * 8) {
        need_shared(row, 16, operation->name, file, line);
        check_read(row, 16, __builtin_return_address(0));
    }
    LdMatrix o{r, row, tiles, transposed};
    collective(operation, ~0u, &o, file, line);
}

extern "C" void emu_mma(float *d, const uint32_t *a, const uint32_t *b, bool bf16, const char *file,
                        int line) {
    MmaOperands o{d, a, b};
    collective(&MMA[bf16], ~0u, &o, file, line);
}

extern "C" uint32_t emu_atomic_add(uint32_t *p, uint32_t v) {
    if (reinterpret_cast<uintptr_t>(p) % 4)
        emu_fail(nullptr, 0, "atomicAdd: address %p is not aligned to 4", static_cast<void *>(p));
    check_write(p, 4, __builtin_return_address(0), ATOMIC);
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
