/// One source, two compilers. nvcc makes device code of a kernel file; g++ (with -DGLM_EMULATOR) makes host
/// code of the same file that runs on cuda/emu. Everything that differs in syntax is named here; every
/// instruction that differs is in ptx.cuh; nothing else may know which compiler it is.
#ifndef GLM_COMPAT_CUH
#define GLM_COMPAT_CUH

#ifdef GLM_EMULATOR

#include "emu/builtins.h"

// Always inlined, as on the device; so helpers of the same name in two kernel files are never merged by the
// linker.
#define DEVICE inline __attribute__((always_inline))
#define CONSTANT static const
#define UNROLL _Pragma("GCC unroll 16")
#define SHARED_MEMORY(T, name) T *name = static_cast<T *>(emu_here.shared)
#define KERNEL_MIN(name, P, threads, min_blocks) KERNEL(name, P, threads)
#define KERNEL(name, P, threads)                                                                             \
    static inline void name(const P &p);                                                                     \
    static void name##_entry(const void *p) { name(*static_cast<const P *>(p)); }                            \
    static emu::Kernel name##_registered(#name, name##_entry, sizeof(P), threads);                           \
    static inline void name(const P &p)

// The place of a call, passed down to the emulator's reports; nothing on the device.
#define WHERE_PARAM , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define WHERE_ONLY const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define WHERE_ARG , file, line
#define WHERE_FIRST file, line

#else // nvcc

#include <stdint.h>

#define DEVICE __device__ __forceinline__
#define CONSTANT __constant__ const
#define UNROLL _Pragma("unroll")
// Its size comes with the launch.
extern __shared__ __align__(128) unsigned char glm_shared_memory[];
#define SHARED_MEMORY(T, name) T *name = reinterpret_cast<T *>(glm_shared_memory)
#define KERNEL(name, P, threads)                                                                             \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ P p)
#define KERNEL_MIN(name, P, threads, min_blocks)                                                             \
    extern "C" __global__ void __launch_bounds__(threads, min_blocks) name(const __grid_constant__ P p)
#define WHERE_PARAM
#define WHERE_ONLY
#define WHERE_ARG
#define WHERE_FIRST

#endif

// Turing has neither bf16 mma nor cp.async: its build leaves every bf16 kernel out. So may others (-D).
#ifndef GLM_HAS_BF16
#ifdef GLM_SM75
#define GLM_HAS_BF16 0
#else
#define GLM_HAS_BF16 1
#endif
#endif

/// The three kernels `name_f32`, `name_f16`, `name_bf16` of a template `name<T>(const P &)`.
#if GLM_HAS_BF16
#define KERNELS_FOR_TYPES(name, P, threads)                                                                  \
    KERNEL(name##_f32, P, threads) { name<float>(p); }                                                       \
    KERNEL(name##_f16, P, threads) { name<half_t>(p); }                                                      \
    KERNEL(name##_bf16, P, threads) { name<bf16_t>(p); }
#else
#define KERNELS_FOR_TYPES(name, P, threads)                                                                  \
    KERNEL(name##_f32, P, threads) { name<float>(p); }                                                       \
    KERNEL(name##_f16, P, threads) { name<half_t>(p); }
#endif

#endif
