/// 16-bit floats and bit tricks of the device, bit by bit, for the host side of ptx.cuh.
#ifndef GLM_EMU_NUMBERS_H
#define GLM_EMU_NUMBERS_H

#include "builtins.h"

namespace emu {

inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
inline uint32_t as_bits(float v) { return __float_as_uint(v); }

/// Exact. A subnormal is the mantissa of a number at 2^-14 less 2^-14: no subnormal floats on the way, which
/// are slow.
inline float half_to_float(uint16_t h) {
    uint32_t magnitude = h & 0x7FFFu, moved = magnitude << 13;
    uint32_t v = moved + (magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u);
    uint32_t subnormal = as_bits(as_float(moved + 0x38800000u) - 0x1p-14f);
    return as_float((magnitude < 0x0400u ? subnormal : v) | uint32_t(h & 0x8000u) << 16);
}

/// To nearest even; NaN becomes the device's 0x7FFF.
inline uint16_t float_to_half(float v) {
    uint32_t bits = as_bits(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return 0x7FFF;
    if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u); // 65520 and more
    if (magnitude < 0x38800000u)                                   // subnormal: let an addition at 2^-1 round
        return uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u));
    return uint16_t(sign | (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
}

inline float bf16_to_float(uint16_t h) { return as_float(uint32_t(h) << 16); }

/// To nearest even; NaN becomes the device's 0x7FFF.
inline uint16_t float_to_bf16(float v) {
    uint32_t bits = as_bits(v);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

/// Rounds to odd: an inexact result gets an odd last bit, so that rounding it once more, to fewer bits,
/// rounds like once.
inline float round_to_odd(double v) {
    float f = float(v);
    if (double(f) == v || v != v) return f;
    uint32_t bits = as_bits(f);
    if (bits & 1u) return f;
    // The other neighbour of v has an odd last bit: towards v.
    bool too_large = (double(f) > v) == (v > 0.0);
    return as_float(too_large ? bits - 1 : bits + 1);
}

/// a + b rounded to odd in double: the product below is exact, the sum may not be.
inline double add_to_odd(double a, double b) {
    volatile double sum = a + b;
    volatile double part = sum - a;
    double s = sum, error = (a - (s - part)) + (b - part);
    uint64_t bits;
    memcpy(&bits, &s, 8);
    if (error != 0.0 && error == error && !(bits & 1u) && s != 0.0) {
        bits += (error > 0.0) == (s > 0.0) ? 1 : uint64_t(-1);
        memcpy(&s, &bits, 8);
    }
    return s;
}

inline uint16_t half_mul(uint16_t a, uint16_t b) {
    return float_to_half(half_to_float(a) * half_to_float(b));
}
inline uint16_t half_fma(uint16_t a, uint16_t b, uint16_t c) {
    double product = double(half_to_float(a)) * double(half_to_float(b));
    return float_to_half(round_to_odd(add_to_odd(product, double(half_to_float(c)))));
}
inline uint16_t bf16_fma(uint16_t a, uint16_t b, uint16_t c) {
    double product = double(bf16_to_float(a)) * double(bf16_to_float(b));
    return float_to_bf16(round_to_odd(add_to_odd(product, double(bf16_to_float(c)))));
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t nibble = selector >> (4 * i);
        uint32_t byte = uint32_t(bytes >> (8 * (nibble & 7u))) & 0xFFu;
        if (nibble & 8u) byte = byte & 0x80u ? 0xFFu : 0u;
        r |= byte << (8 * i);
    }
    return r;
}

inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
    uint32_t r = 0;
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}

template <typename V> inline V load_16(const void *p, const char *file, int line) {
    if (reinterpret_cast<uintptr_t>(p) % 16)
        emu_fail(file, line, "16-byte load from %p, which is not aligned to 16", p);
    return *static_cast<const V *>(p);
}
template <typename V> inline void store_16(void *p, V v, const char *file, int line) {
    if (reinterpret_cast<uintptr_t>(p) % 16)
        emu_fail(file, line, "16-byte store to %p, which is not aligned to 16", p);
    *static_cast<V *>(p) = v;
}

} // namespace emu

#endif
