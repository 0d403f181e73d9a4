/// Counter-based random numbers, the same bits as src/rng.rs: Philox4x32-10 (Salmon et al., SC 2011).
#ifndef GLM_RNG_CUH
#define GLM_RNG_CUH

#include "compat.cuh"

/// Block `block` of the stream (`seed`, `stream`): the 128 random bits of elements `4 block .. 4 block + 3`.
DEVICE void philox(uint32_t (&words)[4], uint64_t seed, uint64_t stream, uint64_t block) {
    words[0] = uint32_t(block);
    words[1] = uint32_t(block >> 32);
    words[2] = uint32_t(stream);
    words[3] = uint32_t(stream >> 32);
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    UNROLL
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = uint64_t(0xD2511F53u) * words[0];
        uint64_t product1 = uint64_t(0xCD9E8D57u) * words[2];
        words[0] = uint32_t(product1 >> 32) ^ words[1] ^ key0;
        words[1] = uint32_t(product1);
        words[2] = uint32_t(product0 >> 32) ^ words[3] ^ key1;
        words[3] = uint32_t(product0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

/// The number in [0, 1) of 32 random bits: their upper 24, exact in float.
DEVICE float uniform(uint32_t bits) { return float(bits >> 8) * (1.0f / 16777216.0f); }

#endif
