// Vectors of floats, as wide as the machine has them, and how threads share work.

#pragma once

#include <cstdint>

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float Vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static inline Vec load(const float *p) { return *(const Vec *)p; }
static inline void store(float *p, Vec v) { *(Vec *)p = v; }
static inline Vec all(float x) { return x - Vec{}; }

static inline Vec bounded(Vec x, float low, float high) {
    x = x < low ? all(low) : x;
    return x > high ? all(high) : x;
}

// e to the x, relative error 2e-7 (the polynomial of Cephes); NaN stays NaN.
static inline Vec exponential(Vec x) {
    x = bounded(x, -87.3f, 88.3f);
    Int n = __builtin_convertvector(x * 1.44269504f + all(12582912.0f) - all(12582912.0f), Int);
    Vec whole = __builtin_convertvector(n, Vec);
    Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return x == x ? y * (Vec)((n + 127) << 23) : x;
}

struct Range { long from, to; };
static inline Range share(long n, int thread, int threads) {
    return {n * thread / threads, n * (thread + 1) / threads};
}
