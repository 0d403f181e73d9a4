/// Kernels that try the emulator: right ones with results to compare, and wrong ones that must be reported.
#include "compat.cuh"
#include "tests.h"
#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

/// Tickets in the order in which threads run: y[thread] = ticket.
KERNEL(test_order, Words, 1024) { p.y[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(p.counter, 1u); }

/// Indices of every dimension.
KERNEL(test_indices, Words, 1024) {
    uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    p.y[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread;
}

/// Two halves of a warp shuffle on their own, a different number of times.
KERNEL(test_partial_masks, Words, 32) {
    uint32_t v = threadIdx.x;
    if (threadIdx.x < 12) {
        for (int i = 0; i < 3; i++) v += __shfl_sync(0x00000FFFu, v, 11);
    } else {
        for (int i = 0; i < 2; i++) v += __shfl_sync(0xFFFFF000u, v, 12);
        __syncwarp(0xFFFFF000u);
    }
    p.y[threadIdx.x] = v;
}

/// Threads from x[0] on return; the others go on with a mask of their own.
KERNEL(test_early_exit, Words, 32) {
    uint32_t mask = __ballot_sync(0xFFFFFFFFu, threadIdx.x < p.n);
    p.y[threadIdx.x] = 77;
    if (threadIdx.x >= p.n) return;
    uint32_t v = threadIdx.x;
    for (uint32_t i = 1; i < p.n; i++) v += __shfl_sync(mask, threadIdx.x, int(i)) * (i == 1);
    p.y[threadIdx.x] = v + uint32_t(__all_sync(mask, 1));
}

/// A histogram in shared and in global memory.
KERNEL(test_atomics, Words, 1024) {
    SHARED_MEMORY(uint32_t, bins);
    if (threadIdx.x < 16) bins[threadIdx.x] = 0;
    __syncthreads();
    atomicAdd(&bins[threadIdx.x % 16], threadIdx.x);
    atomicAdd(p.counter, 1u);
    __syncthreads();
    if (threadIdx.x < 16) p.y[blockIdx.x * 16 + threadIdx.x] = bins[threadIdx.x];
}

/// Barriers that count.
KERNEL(test_barrier_votes, Words, 1024) {
    int n = __syncthreads_count(threadIdx.x % 3 == 0);
    int all = __syncthreads_and(threadIdx.x < p.n), any = __syncthreads_or(threadIdx.x == p.n);
    p.y[threadIdx.x] = uint32_t(n * 4 + (all != 0) * 2 + (any != 0));
}

/// What a thread sees of its two groups of copies before, between and after the waits. One warp; x: 32 x 8
/// words.
KERNEL(test_lateness, Words, 32) {
    SHARED_MEMORY(uint32_t, s);
    uint32_t *mine = s + threadIdx.x * 8;
    cp_async_16(mine, p.x + threadIdx.x * 8, true);
    cp_async_commit();
    cp_async_16(mine + 4, p.x + threadIdx.x * 8 + 4, threadIdx.x % 2 == 0);
    cp_async_commit();
    uint32_t *y = p.y + threadIdx.x * 6;
    y[0] = mine[0], y[1] = mine[4];
    cp_async_wait<1>();
    y[2] = mine[0], y[3] = mine[4];
    cp_async_wait<0>();
    y[4] = mine[0], y[5] = mine[7];
}

KERNEL(test_reduce, Words, 1024) {
    SHARED_MEMORY(float, scratch);
    float v = __uint_as_float(p.x[blockIdx.x * blockDim.x + threadIdx.x]);
    float sum = block_sum(v, scratch), most = block_max(v, scratch), twice = block_sum(v + v, scratch);
    uint32_t *y = p.y + (blockIdx.x * blockDim.x + threadIdx.x) * 3;
    y[0] = __float_as_uint(sum), y[1] = __float_as_uint(most), y[2] = __float_as_uint(twice);
}

/// y = x + 1 through 16-byte vectors, once per type.
template <typename T> DEVICE void test_vectors(const Words &p) {
    uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) * Vec<T>::N;
    if (i >= p.n) return;
    Vec<T> v = Vec<T>::load(reinterpret_cast<const T *>(p.x) + i);
    for (int j = 0; j < Vec<T>::N; j++) v.set(j, v.get(j) + 1.0f);
    v.store(reinterpret_cast<T *>(p.y) + i);
}
KERNELS_FOR_TYPES(test_vectors, Words, 128)

/// pack2(unpack2) with the halves exchanged.
KERNEL(test_pairs, Words, 32) {
    Float2 h = unpack2<half_t>(p.x[threadIdx.x]), b = unpack2<bf16_t>(p.x[threadIdx.x]);
    p.y[2 * threadIdx.x] = pack2<half_t>(h.y, h.x);
    p.y[2 * threadIdx.x + 1] = pack2<bf16_t>(b.y, b.x);
}

static int __attribute__((noinline)) overflow_stack(volatile int *p, int depth) {
    volatile int big[4096];
    big[depth & 4095] = depth;
    return depth > 1000000 ? *p : overflow_stack(big, depth + 1) + big[1];
}

/// One mistake each; 64 threads, 256 bytes of shared memory. main.cpp has the reports that they must end in.
KERNEL(test_mistakes, Words, 64) {
    SHARED_MEMORY(uint32_t, s);
    uint32_t thread = threadIdx.x, lane = thread % 32;
    uint32_t r[4], r2[2] = {};
    float d[4] = {};
    if (p.n != NO_MISTAKE && p.n != RETURNED_BEFORE_BARRIER && p.n != READ_UNWRITTEN) {
        if (thread < (p.n >= RACE_WRITE_READ && p.n != READ_PAST_END ? 64 : 60)) s[thread] = 0;
        __syncthreads();
    }
    switch (p.n) {
    case RETURNED_BEFORE_BARRIER:
        if (thread >= 40) return;
        __syncthreads();
        break;
    case TWO_BARRIERS:
        if (thread < 32)
            __syncthreads();
        else
            __syncthreads_count(1);
        break;
    case NOT_IN_MASK: __shfl_sync(0xFFFFFFFEu, lane, 1); break;
    case RETURNED_IN_MASK:
        if (lane == 5) return;
        __shfl_xor_sync(0xFFFFFFFFu, lane, 1);
        break;
    case TWO_COLLECTIVES:
        if (lane < 16)
            __shfl_xor_sync(0xFFFFFFFFu, lane, 1);
        else
            __ballot_sync(0xFFFFFFFFu, 1);
        break;
    case TWO_MASKS:
        if (lane < 16)
            __syncwarp(0xFFFFFFFFu);
        else
            __syncwarp(0xFFFF0000u | (lane == 16 ? 0xFFFFu : 0u));
        break;
    case WARP_AND_BLOCK:
        if (lane == 0)
            __syncwarp();
        else
            __syncthreads();
        break;
    case SHUFFLE_FROM_OUTSIDE:
        if (lane < 16) __shfl_sync(0xFFFFu, lane, 20);
        break;
    case BAD_WIDTH: __shfl_sync(0xFFFFFFFFu, lane, 0, 12); break;
    case MMA_AT_TWO_LINES:
        r[0] = r[1] = r[2] = r[3] = 0;
        if (lane < 16)
            mma_16x8x16<half_t>(d, r, r2);
        else
            mma_16x8x16<half_t>(d, r, r2);
        break;
    case COPY_TO_UNALIGNED: cp_async_16(s + 1, p.x, true); break;
    case COPY_FROM_UNALIGNED: cp_async_16(s, p.x + 1, true); break;
    case COPY_OUTSIDE: cp_async_16(s + 64, p.x, true); break;
    case COPY_NEVER_WAITED:
        cp_async_16(s + lane / 2 * 4, p.x, true);
        cp_async_commit();
        break;
    case LDMATRIX_UNALIGNED: ldmatrix_x4(r, s + lane); break;
    case LDMATRIX_OUTSIDE: ldmatrix_x4(r, s + lane * 4); break;
    case LOAD_UNALIGNED: load_16(p.x + 2); break;
    case ATOMIC_UNALIGNED:
        atomicAdd(reinterpret_cast<uint32_t *>(reinterpret_cast<char *>(p.counter) + 1), 1u);
        break;
    case WRITE_JUST_PAST: s[60 + lane / 8] = thread; break; // 240 bytes were asked for
    case WRITE_FAR_PAST: s[1000 + thread] = thread; break;
    case WILD_READ:
        p.y[thread] = *reinterpret_cast<const volatile uint32_t *>(uintptr_t(thread) * 4 + 64);
        break;
    case WILD_WRITE: *reinterpret_cast<volatile uint32_t *>(uintptr_t(p.x[thread]) + 0x10) = thread; break;
    case STACK_OVERFLOW: p.y[thread] = uint32_t(overflow_stack(nullptr, 0)); break;
    case DIVISION_BY_ZERO: p.y[thread] = 7u / p.x[thread]; break;
    case RACE_WRITE_READ: // thread i + 1 reads what thread i wrote
        s[thread] = thread;
        p.y[thread] = s[(thread + 1) % 64];
        break;
    case RACE_READ_WRITE:
        s[thread] = thread;
        __syncthreads();
        p.y[thread] = s[(thread + 1) % 64];
        s[thread] = 1;
        break;
    case RACE_WRITE_WRITE: s[lane] = thread; break;
    case RACE_WITHOUT_SYNCWARP: // a shuffle orders no memory
        s[thread] = thread;
        __shfl_sync(0xFFFFFFFFu, lane, 0);
        p.y[thread] = s[thread ^ 1];
        break;
    case RACE_PARTIAL_SYNCWARP:
        s[thread] = thread;
        if (lane < 16)
            __syncwarp(0xFFFFu);
        else
            __syncwarp(0xFFFF0000u);
        p.y[thread] = s[thread ^ 16];
        break;
    case RACE_ATOMIC_AND_PLAIN:
        if (thread == 1)
            p.y[0] = s[0];
        else
            atomicAdd(s, 1u);
        break;
    case READ_UNWRITTEN: p.y[thread] = s[thread]; break;
    case READ_COPY_IN_FLIGHT:
        cp_async_16(s + lane / 2 * 4, p.x, true);
        p.y[thread] = s[lane / 2 * 4];
        cp_async_wait<0>();
        break;
    case READ_PAST_END: p.y[thread] = s[62]; break; // 240 bytes were asked for
    case NO_MISTAKE:                                // everything that the checker could take for one
        s[thread] = thread;
        __syncwarp();
        p.y[thread] = s[thread ^ 1];
        if (lane < 16)
            __syncwarp(0xFFFFu);
        else
            __syncwarp(0xFFFF0000u);
        if (lane % 2 == 0) s[thread + 1] += s[thread];
        __syncthreads();
        p.y[thread] = s[63 - thread];
        __syncthreads();
        break;
    }
}
