/// Element types of tensors, their conversions (round to nearest even), pairs in a register, 16 bytes at a
/// time.
#ifndef GLM_TYPES_CUH
#define GLM_TYPES_CUH

#include "compat.cuh"
#include "ptx.cuh"

struct half_t {
    uint16_t bits;
};
struct bf16_t {
    uint16_t bits;
};
struct Float2 {
    float x, y;
};

DEVICE float to_float(float v) { return v; }
DEVICE float to_float(half_t v) { return half_bits_to_float(v.bits); }
DEVICE float to_float(bf16_t v) { return bf16_bits_to_float(v.bits); }

template <typename T> struct Convert;
template <> struct Convert<float> {
    static DEVICE float from(float v) { return v; }
};
template <> struct Convert<half_t> {
    static DEVICE half_t from(float v) { return half_t{float_to_half_bits(v)}; }
    static DEVICE uint32_t pack(float lo, float hi) { return pack_half2(lo, hi); }
    static DEVICE Float2 unpack(uint32_t v) {
        return Float2{half_bits_to_float(uint16_t(v & 0xFFFFu)), half_bits_to_float(uint16_t(v >> 16))};
    }
};
#if GLM_HAS_BF16
template <> struct Convert<bf16_t> {
    static DEVICE bf16_t from(float v) { return bf16_t{float_to_bf16_bits(v)}; }
    static DEVICE uint32_t pack(float lo, float hi) { return pack_bf162(lo, hi); }
    static DEVICE Float2 unpack(uint32_t v) {
        return Float2{__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
    }
};
#endif

/// Rounds to T, to nearest even.
template <typename T> DEVICE T from_float(float v) { return Convert<T>::from(v); }
/// Two elements of T in one register; `lo` has the lower address.
template <typename T> DEVICE uint32_t pack2(float lo, float hi) { return Convert<T>::pack(lo, hi); }
template <typename T> DEVICE Float2 unpack2(uint32_t v) { return Convert<T>::unpack(v); }

/// 16 bytes of T, moved in one instruction. Addresses must be aligned to 16 bytes.
template <typename T> struct Vec {
    static constexpr int N = 8;
    U128 raw;
    static DEVICE Vec load(const T *p WHERE_PARAM) { return Vec{load_16(p WHERE_ARG)}; }
    DEVICE void store(T *p WHERE_PARAM) const { store_16(p, raw WHERE_ARG); }
    DEVICE uint32_t word(int i) const { return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w; }
    DEVICE void set_word(int i, uint32_t v) {
        (i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w) = v;
    }
    DEVICE float get(int i) const { return to_float(T{uint16_t(word(i / 2) >> (i % 2 * 16))}); }
    DEVICE void set(int i, float v) {
        uint32_t bits = from_float<T>(v).bits;
        uint32_t old = word(i / 2);
        set_word(i / 2, i % 2 ? (old & 0xFFFFu) | bits << 16 : (old & 0xFFFF0000u) | bits);
    }
};
template <> struct Vec<float> {
    static constexpr int N = 4;
    U128 raw;
    static DEVICE Vec load(const float *p WHERE_PARAM) { return Vec{load_16(p WHERE_ARG)}; }
    DEVICE void store(float *p WHERE_PARAM) const { store_16(p, raw WHERE_ARG); }
    DEVICE float get(int i) const {
        return __uint_as_float(i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w);
    }
    DEVICE void set(int i, float v) {
        (i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w) = __float_as_uint(v);
    }
};

#endif
