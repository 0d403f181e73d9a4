/// The op tests that mutants must fail. Prints the schedules at which something failed and ends with status
/// 1, or ends with 0.
#include "emu.h"
#include "mutants.h"
#include "numbers.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

static std::string launch(const char *kernel, uint32_t x, uint32_t y, uint32_t threads, uint32_t shared,
                          const void *p, size_t bytes) {
    char error[1024];
    const uint32_t grid[3] = {x, y, 1}, block[3] = {threads, 1, 1};
    emu_launch(kernel, grid, block, shared, p, bytes, error, sizeof error);
    return error;
}

static std::string reduce() {
    std::vector<float> x(3 * 256), y(3 * 256);
    for (size_t i = 0; i < x.size(); i++) x[i] = float(i * 7 % 11);
    MutantReduce p{y.data(), x.data(), 0};
    std::string error = launch("mutant_reduce", 3, 1, 256, 32, &p, sizeof p);
    for (size_t i = 0; i < y.size(); i++) {
        float sum = 0, squares = 0;
        for (size_t j = i / 256 * 256; j < i / 256 * 256 + 256; j++) sum += x[j], squares += x[j] * x[j];
        if (error.empty() && y[i] != sum + 1000.0f * squares) return "reduce: wrong sum";
    }
    return error;
}

static std::string transpose() {
    for (uint32_t n : {1023u, 1024u, 2000u}) {
        std::vector<float> x(n), y(n + 64, -1.0f);
        for (uint32_t i = 0; i < n; i++) x[i] = float(i);
        MutantReduce p{y.data(), x.data(), n};
        std::string error = launch("mutant_transpose", (n + 1023) / 1024, 1, 32, 32 * 33 * 4, &p, sizeof p);
        if (!error.empty()) return error;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t from = i / 1024 * 1024 + i % 32 * 32 + i % 1024 / 32;
            if (y[i] != (from < n ? x[from] : 0.0f)) return "transpose: wrong element";
        }
        for (uint32_t i = n; i < n + 64; i++)
            if (y[i] != -1.0f) return "transpose: wrote past the end";
    }
    return "";
}

static std::string gemm(const char *kernel, int stages) {
    const int m = 50, n = 64, k = 160;
    std::mt19937 bits(3);
    std::vector<uint16_t> a(size_t(m * k)), b(size_t(k * n));
    for (uint16_t &v : a) v = emu::float_to_half(float(int(bits() % 9) - 4));
    for (uint16_t &v : b) v = emu::float_to_half(float(int(bits() % 9) - 4));
    std::vector<float> c(size_t(m * n) + 64, -99.0f);
    MutantGemm p{c.data(), a.data(), b.data(), m, n, k};
    std::string error =
        launch(kernel, n / 32, (m + 31) / 32, 128, uint32_t(stages * 2 * 32 * 40 * 2), &p, sizeof p);
    if (!error.empty()) return error;
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int l = 0; l < k; l++)
                sum += emu::half_to_float(a[size_t(i * k + l)]) * emu::half_to_float(b[size_t(l * n + j)]);
            if (c[size_t(i * n + j)] != sum) return std::string(kernel) + ": wrong element";
        }
    for (size_t i = size_t(m * n); i < c.size(); i++)
        if (c[i] != -99.0f) return std::string(kernel) + ": wrote past the end";
    return "";
}

int main() {
    int failed = 0;
    for (int schedule : {0, 1, 2, 3, 5}) {
        emu_set_schedule(schedule);
        std::string first;
        for (const std::string &s :
             {reduce(), transpose(), gemm("mutant_gemm_1", 1), gemm("mutant_gemm_3", 3)})
            if (first.empty()) first = s;
        if (first.empty()) continue;
        printf("  schedule %d: %s\n", schedule, first.c_str());
        failed++;
    }
    return failed > 0;
}
