/// Every PTX instruction that kernels use beyond plain CUDA C++: its asm for the device and, beside it, its
/// definition for the emulator. The two sides of a function must agree bit by bit, except where its comment
/// says approximately.
#ifndef GLM_PTX_CUH
#define GLM_PTX_CUH

#include "compat.cuh"

struct half_t;
struct bf16_t;

/// 16 bytes.
struct alignas(16) U128 {
    uint32_t x, y, z, w;
};

#ifdef GLM_EMULATOR
#include "emu/numbers.h"
#else
/// The 32-bit address that ldmatrix and cp.async want.
DEVICE uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }
#endif

// --- Conversions -------------------------------------------------------------------------------------------

DEVICE float half_bits_to_float(uint16_t bits) {
#ifdef GLM_EMULATOR
    return emu::half_to_float(bits);
#else
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
#endif
}

DEVICE uint16_t float_to_half_bits(float v) {
#ifdef GLM_EMULATOR
    return emu::float_to_half(v);
#else
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
#endif
}

DEVICE float bf16_bits_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

DEVICE uint32_t pack_half2(float lo, float hi) {
#if defined(GLM_EMULATOR)
    return emu::float_to_half(lo) | uint32_t(emu::float_to_half(hi)) << 16;
#elif defined(GLM_SM75)
    return float_to_half_bits(lo) | uint32_t(float_to_half_bits(hi)) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
#endif
}

#if GLM_HAS_BF16
DEVICE uint16_t float_to_bf16_bits(float v) {
#ifdef GLM_EMULATOR
    return emu::float_to_bf16(v);
#else
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
#endif
}

DEVICE uint32_t pack_bf162(float lo, float hi) {
#ifdef GLM_EMULATOR
    return emu::float_to_bf16(lo) | uint32_t(emu::float_to_bf16(hi)) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
#endif
}
#endif

// --- 16 bytes at a time ------------------------------------------------------------------------------------

/// Plain 16-byte load; `p` aligned to 16 bytes.
DEVICE U128 load_16(const void *p WHERE_PARAM) {
#ifdef GLM_EMULATOR
    return emu::load_16<U128>(p, file, line);
#else
    uint4 v = *static_cast<const uint4 *>(p);
    return U128{v.x, v.y, v.z, v.w};
#endif
}

/// Plain 16-byte store; `p` aligned to 16 bytes.
DEVICE void store_16(void *p, U128 v WHERE_PARAM) {
#ifdef GLM_EMULATOR
    emu::store_16(p, v, file, line);
#else
    *static_cast<uint4 *>(p) = make_uint4(v.x, v.y, v.z, v.w);
#endif
}

/// 16 bytes of global memory that are read once (weights): through the read-only path, leaving L1 to the
/// activations. `global` aligned to 16 bytes and not written by this kernel.
DEVICE U128 load_stream_16(const void *global WHERE_PARAM) {
#ifdef GLM_EMULATOR
    return emu::load_16<U128>(global, file, line);
#else
    U128 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(global));
    return v;
#endif
}

// --- Matrix fragments --------------------------------------------------------------------------------------

/// Four 8x8 tiles of 16-bit elements. Lane l names row l % 8 of tile l / 8 (16 bytes in shared memory,
/// aligned to 16); r[i] of lane l is row l / 4, columns 2 (l % 4) and the next, of tile i.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void *row WHERE_PARAM) {
#ifdef GLM_EMULATOR
    emu_ldmatrix(r, row, 4, false, file, line);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

/// The same tiles transposed: r[i] of lane l is rows 2 (l % 4) and the next, column l / 4, of tile i.
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row WHERE_PARAM) {
#ifdef GLM_EMULATOR
    emu_ldmatrix(r, row, 4, true, file, line);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

/// Two tiles: rows are named by lanes 0 to 15; the other lanes' addresses are ignored.
DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void *row WHERE_PARAM) {
#ifdef GLM_EMULATOR
    emu_ldmatrix(r, row, 2, false, file, line);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row WHERE_PARAM) {
#ifdef GLM_EMULATOR
    emu_ldmatrix(r, row, 2, true, file, line);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

template <typename T> struct Mma;

/// d += a b: a 16x16, b 16x8 of T, d 16x8 of float. Lane l, g = l / 4, t = l % 4:
/// a[0]: (row g, k 2t, 2t+1), a[1]: (g+8, same), a[2]: (g, k 2t+8, 2t+9), a[3]: (g+8, same as a[2]);
/// b[0]: (k 2t, 2t+1, n g), b[1]: (k 2t+8, 2t+9, n g); d[0], d[1]: (row g, n 2t, 2t+1), d[2], d[3]: (g+8,
/// same). The device's order of additions is its own: results agree approximately.
template <typename T>
DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] WHERE_PARAM) {
#ifdef GLM_EMULATOR
    emu_mma(d, a, b, Mma<T>::BF16, file, line);
#else
    Mma<T>::run(d, a, b);
#endif
}

template <> struct Mma<half_t> {
#ifdef GLM_EMULATOR
    static constexpr bool BF16 = false;
#elif defined(GLM_SM75)
    // Turing's largest f16 product has k = 8: one after the other.
    static DEVICE void half_run(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a0), "r"(a1), "r"(b0));
    }
    static DEVICE void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        half_run(d, a[0], a[1], b[0]);
        half_run(d, a[2], a[3], b[1]);
    }
#else
    static DEVICE void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
};

#if GLM_HAS_BF16
template <> struct Mma<bf16_t> {
#ifdef GLM_EMULATOR
    static constexpr bool BF16 = true;
#else
    static DEVICE void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
};
#endif

// --- Asynchronous copies -----------------------------------------------------------------------------------

/// Starts copying 16 bytes of global to shared memory, past the registers; zeros, and `global` not read, when
/// not `valid`. Both addresses aligned to 16 bytes. On Turing a plain copy, done at once.
DEVICE void cp_async_16(void *shared, const void *global, bool valid WHERE_PARAM) {
#if defined(GLM_EMULATOR)
    emu_cp_async_16(shared, global, valid, file, line);
#elif defined(GLM_SM75)
    *static_cast<uint4 *>(shared) = valid ? *static_cast<const uint4 *>(global) : make_uint4(0, 0, 0, 0);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#endif
}

/// Closes this thread's current group of copies.
DEVICE void cp_async_commit() {
#if defined(GLM_EMULATOR)
    emu_cp_async_commit();
#elif !defined(GLM_SM75)
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most N of this thread's groups are in flight. Other threads see the copies after a barrier.
template <int N> DEVICE void cp_async_wait() {
#if defined(GLM_EMULATOR)
    emu_cp_async_wait(N);
#elif !defined(GLM_SM75)
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// --- Bits --------------------------------------------------------------------------------------------------

/// Byte i of the result is chosen by nibble i of `selector`: its low 3 bits name a byte of {b, a} (a has 0 to
/// 3); its top bit replicates that byte's sign instead.
DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef GLM_EMULATOR
    return emu::prmt(a, b, selector);
#else
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
#endif
}

/// Any bitwise function of three: LUT is its value on a = 0xF0, b = 0xCC, c = 0xAA.
template <int LUT> DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    static_assert(LUT >= 0 && LUT < 256, "lop3 takes a table of 8 bits");
#ifdef GLM_EMULATOR
    return emu::lop3(a, b, c, LUT);
#else
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(LUT));
    return r;
#endif
}

// --- Packed pairs ------------------------------------------------------------------------------------------

template <typename T> struct Pair;

template <> struct Pair<half_t> {
    static DEVICE uint32_t mul(uint32_t a, uint32_t b) {
#ifdef GLM_EMULATOR
        return emu::half_mul(uint16_t(a), uint16_t(b)) | uint32_t(emu::half_mul(a >> 16, b >> 16)) << 16;
#else
        uint32_t r; // .rn: without it ptxas may fuse it with a following addition
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
#endif
    }
    static DEVICE uint32_t add(uint32_t a, uint32_t b) {
#ifdef GLM_EMULATOR
        return emu::half_fma(0x3C00, a, b) | uint32_t(emu::half_fma(0x3C00, a >> 16, b >> 16)) << 16;
#else
        uint32_t r;
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
#endif
    }
    static DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
#ifdef GLM_EMULATOR
        return emu::half_fma(a, b, c) | uint32_t(emu::half_fma(a >> 16, b >> 16, c >> 16)) << 16;
#else
        uint32_t r;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
        return r;
#endif
    }
};

#if GLM_HAS_BF16
// Before Hopper there is only the fused product: a b + (-0) and a 1 + b are the others, with their rounding.
template <> struct Pair<bf16_t> {
    static DEVICE uint32_t mul(uint32_t a, uint32_t b) { return fma(a, b, 0x80008000u); }
    static DEVICE uint32_t add(uint32_t a, uint32_t b) { return fma(a, 0x3F803F80u, b); }
    static DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
#ifdef GLM_EMULATOR
        return emu::bf16_fma(a, b, c) | uint32_t(emu::bf16_fma(a >> 16, b >> 16, c >> 16)) << 16;
#else
        uint32_t r;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
        return r;
#endif
    }
};
#endif

/// a b, a + b, a b + c of both halves of a register, each rounded once to T.
template <typename T> DEVICE uint32_t mul2(uint32_t a, uint32_t b) { return Pair<T>::mul(a, b); }
template <typename T> DEVICE uint32_t add2(uint32_t a, uint32_t b) { return Pair<T>::add(a, b); }
template <typename T> DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    return Pair<T>::fma(a, b, c);
}

// --- Exponentials ------------------------------------------------------------------------------------------

/// 2^x, to about 2 units in the last place; results below the smallest normal number are 0 on the device.
DEVICE float exp2_approx(float x) {
#ifdef GLM_EMULATOR
    return exp2f(x);
#else
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#endif
}

/// e^x from exp2_approx: relative error about |x| 2^-23; 0 for -infinity.
DEVICE float fast_exp(float x) { return exp2_approx(x * 1.4426950408889634f); }

/// 1 / x, to about 1 unit in the last place; subnormal numbers count as 0 on the device.
DEVICE float reciprocal_approx(float x) {
#ifdef GLM_EMULATOR
    return 1.0f / x;
#else
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#endif
}

// --- The compiler -----------------------------------------------------------------------------------------------------

/// x itself, in a register from here on: the front end neither moves its computation to where x is used (into loops, under
/// conditions) nor repeats it there.
DEVICE uint32_t keep(uint32_t x) {
#ifndef GLM_EMULATOR
    asm volatile("" : "+r"(x));
#endif
    return x;
}

#endif
