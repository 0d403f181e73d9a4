/// What a kernel file sees instead of CUDA's built-ins when g++ compiles it.
///
/// The calls below take their place in the source as default arguments, for the reports.
#ifndef GLM_EMU_BUILTINS_H
#define GLM_EMU_BUILTINS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EMU_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

/// One value per operating-system thread, in the executable's own segment: reading threadIdx is one
/// instruction.
#define EMU_LOCAL extern __thread __attribute__((tls_model("initial-exec")))

namespace emu {

struct Index {
    uint32_t x, y, z;
};

/// Where the running CUDA thread is.
struct Here {
    Index thread, block, block_dim, grid_dim;
    void *shared;
};

/// A kernel's entry in the registry; kernels are static objects of this type.
struct Kernel {
    const char *name;
    void (*run)(const void *params);
    uint64_t params_bytes;
    uint32_t max_threads;
    Kernel *next;
    Kernel(const char *name, void (*run)(const void *), uint64_t params_bytes, uint32_t max_threads);
};

} // namespace emu

EMU_LOCAL emu::Here emu_here;

extern "C" {
/// Ends the launch with a message that starts with kernel, block, thread and place.
[[noreturn]] void emu_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
int emu_sync_threads(int combine, int value, const char *file, int line);
void emu_sync_warp(uint32_t mask, const char *file, int line);
uint64_t emu_shuffle(int kind, uint32_t mask, uint64_t value, int lane, int width, const char *file,
                     int line);
uint32_t emu_ballot(uint32_t mask, bool predicate, const char *file, int line);
void emu_ldmatrix(uint32_t *r, const void *row, int tiles, bool transposed, const char *file, int line);
void emu_mma(float *d, const uint32_t *a, const uint32_t *b, bool bf16, const char *file, int line);
void emu_cp_async_16(void *shared, const void *global, bool valid, const char *file, int line);
void emu_cp_async_commit(void);
void emu_cp_async_wait(int groups);
uint32_t emu_atomic_add(uint32_t *p, uint32_t v);
}

#define threadIdx (emu_here.thread)
#define blockIdx (emu_here.block)
#define blockDim (emu_here.block_dim)
#define gridDim (emu_here.grid_dim)
constexpr int warpSize = 32;

// So that a stray CUDA keyword does not stop g++.
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __constant__ static

// --- Barriers and collectives ------------------------------------------------------------------------------

enum { EMU_PLAIN, EMU_COUNT, EMU_AND, EMU_OR };
enum { EMU_INDEX, EMU_XOR, EMU_DOWN, EMU_UP };

inline void __syncthreads(EMU_WHERE) { emu_sync_threads(EMU_PLAIN, 0, file, line); }
inline int __syncthreads_count(int p, EMU_WHERE) { return emu_sync_threads(EMU_COUNT, p, file, line); }
inline int __syncthreads_and(int p, EMU_WHERE) { return emu_sync_threads(EMU_AND, p, file, line); }
inline int __syncthreads_or(int p, EMU_WHERE) { return emu_sync_threads(EMU_OR, p, file, line); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, EMU_WHERE) { emu_sync_warp(mask, file, line); }

template <typename T>
inline T emu_shuffle_any(int kind, uint32_t mask, T v, int lane, int width, const char *file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof(T));
    bits = emu_shuffle(kind, mask, bits, lane, width, file, line);
    memcpy(&v, &bits, sizeof(T));
    return v;
}
template <typename T> inline T __shfl_sync(uint32_t mask, T v, int lane, int width = 32, EMU_WHERE) {
    return emu_shuffle_any(EMU_INDEX, mask, v, lane, width, file, line);
}
template <typename T> inline T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32, EMU_WHERE) {
    return emu_shuffle_any(EMU_XOR, mask, v, lanes, width, file, line);
}
template <typename T> inline T __shfl_down_sync(uint32_t mask, T v, int delta, int width = 32, EMU_WHERE) {
    return emu_shuffle_any(EMU_DOWN, mask, v, delta, width, file, line);
}
template <typename T> inline T __shfl_up_sync(uint32_t mask, T v, int delta, int width = 32, EMU_WHERE) {
    return emu_shuffle_any(EMU_UP, mask, v, delta, width, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, EMU_WHERE) {
    return emu_ballot(mask, p != 0, file, line);
}
inline int __any_sync(uint32_t mask, int p, EMU_WHERE) { return emu_ballot(mask, p != 0, file, line) != 0; }
inline int __all_sync(uint32_t mask, int p, EMU_WHERE) { return emu_ballot(mask, p == 0, file, line) == 0; }

// --- Memory ------------------------------------------------------------------------------------------------

inline uint32_t atomicAdd(uint32_t *p, uint32_t v) { return emu_atomic_add(p, v); }
inline int atomicAdd(int *p, int v) {
    return int(emu_atomic_add(reinterpret_cast<uint32_t *>(p), uint32_t(v)));
}
template <typename T> inline T __ldg(const T *p) { return *p; }

// --- Numbers -----------------------------------------------------------------------------------------------

#define EMU_MIN_MAX(T)                                                                                       \
    inline T min(T a, T b) { return b < a ? b : a; }                                                         \
    inline T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline int __float2int_rn(float v) { return int(lrintf(v)); }

inline uint32_t __float_as_uint(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
inline int __float_as_int(float v) { return int(__float_as_uint(v)); }
inline float __int_as_float(int v) { return __uint_as_float(uint32_t(v)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(uint32_t(v)); }

#endif
