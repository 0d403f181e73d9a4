/// A few neighbouring elements as floats: by 16-byte accesses where addresses allow them, one by one elsewhere.
#ifndef GLM_SPAN_CUH
#define GLM_SPAN_CUH

#include "types.cuh"

/// What a kernel writes where there is no true value: it cannot be overlooked further on.
constexpr float NOT_A_NUMBER = __builtin_nanf("");

/// Do all of these lie on 16-byte boundaries? Those of rows do when their width in bytes is passed as well.
template <typename... Addresses> DEVICE bool aligned_16(Addresses... addresses) {
    return ((uint64_t(addresses) | ...) & 15) == 0;
}

/// Aligned addresses, and whole vectors or nothing: `left` is 0 or at least `N`.
struct Vectors {
    /// `values = from[0 .. N]`, or zeros when `left` is 0.
    template <int N, typename T> static DEVICE void load(float (&values)[N], const T *from, uint32_t left) {
        constexpr int WIDTH = Vec<T>::N;
        static_assert(N % WIDTH == 0, "a span is made of whole vectors");
        Vec<T> vectors[N / WIDTH] = {};
        if (left > 0) {
            UNROLL
            for (int i = 0; i < N / WIDTH; i++) {
                vectors[i] = Vec<T>::load(from + i * WIDTH);
            }
        }
        UNROLL
        for (int i = 0; i < N; i++) {
            values[i] = vectors[i / WIDTH].get(i % WIDTH);
        }
    }

    /// `to[0 .. N] = values`, unless `left` is 0.
    template <int N, typename T> static DEVICE void store(T *to, const float (&values)[N], uint32_t left) {
        constexpr int WIDTH = Vec<T>::N;
        static_assert(N % WIDTH == 0, "a span is made of whole vectors");
        UNROLL
        for (int i = 0; i < N; i += WIDTH) {
            Vec<T> vector;
            UNROLL
            for (int j = 0; j < WIDTH; j++) {
                if constexpr (sizeof(T) == 4) {
                    vector.set(j, values[i + j]);
                } else if (j % 2 == 0) {
                    vector.set_word(j / 2, pack2<T>(values[i + j], values[i + j + 1]));
                }
            }
            if (left > 0) {
                vector.store(to + i);
            }
        }
    }
};

/// Any address, and any number of elements.
struct Singles {
    /// `values = from[0 .. N]`; only the first `left` exist, the others become 0.
    template <int N, typename T> static DEVICE void load(float (&values)[N], const T *from, uint32_t left) {
        UNROLL
        for (int i = 0; i < N; i++) {
            values[i] = uint32_t(i) < left ? to_float(from[i]) : 0.0f;
        }
    }

    /// `to[0 .. N] = values`, of which only the first `left` have a place.
    template <int N, typename T> static DEVICE void store(T *to, const float (&values)[N], uint32_t left) {
        UNROLL
        for (int i = 0; i < N; i++) {
            if (uint32_t(i) < left) {
                to[i] = from_float<T>(values[i]);
            }
        }
    }
};

/// Calls `f(access)` with `Vectors` or `Singles`. One decision around everything that a thread does, not one around each
/// access: the loads behind a decision are not in flight together with those before it.
template <typename F> DEVICE void by_access(bool vectors, F f) {
    if (vectors) {
        f(Vectors{});
    } else {
        f(Singles{});
    }
}

/// Calls `f(access, i, left)` for the `N` elements from `i` on of this thread, of which `left` exist. One span a thread.
template <int N, typename F> DEVICE void own_span(uint64_t n, bool aligned, F f) {
    const uint64_t i = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (i < n) {
        const uint32_t left = uint32_t(min(n - i, uint64_t(N)));
        by_access(aligned && left == N, [&](auto access) { f(access, i, left); });
    }
}

#endif
