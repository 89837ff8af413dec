// SwiGLU experts on CPUs, where MKL is slow: few rows through each of some experts, and the gradients of their weights;
// see model/compiled.py. fp32.
//
// Weights are those of the modules, [N, K] row by row. With few rows the product waits for them, so four or two of them
// are read at a time, each once, and the next are asked for meanwhile. Every number depends on its own row alone: sums
// run in one order, whatever comes with it.
//
// The gradient of a weight is as large as the weight, and written once: where it goes to memory past the caches, what
// lay there need not be read first.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <omp.h>
#include <sys/mman.h>

#include "routing.h"
#include "vectors.h"

// Rows x for which the sums of four or two weight rows at once fit into the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WITH_FOUR = 6, WITH_TWO = 12;
#else
constexpr int WITH_FOUR = 3, WITH_TWO = 5;
#endif
constexpr int PANEL = WITH_TWO;

static inline float sum(Vec v) {
    Int lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    for (int half = VL / 2; half; half /= 2) v += __builtin_shuffle(v, lane ^ half);
    return v[0];
}

// R rows x [K] (stride ldx) times B weight rows w [K]: out [R][B] (stride ldo).
template <int R, int B>
static void tile(const float *w, long K, const float *x, long ldx, float *out, long ldo) {
    Vec acc[R][B] = {};
    long k = 0;
    for (; k + VL <= K; k += VL) {
        Vec rows[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) rows[r] = load(x + r * ldx + k);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
            const float *from = w + b * K + k;
            __builtin_prefetch(from + B * K);
            const Vec weight = load(from);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[r][b] += rows[r] * weight;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
            float total = sum(acc[r][b]);
            for (long i = k; i < K; i++) total += x[r * ldx + i] * w[b * K + i];
            out[r * ldo + b] = total;
        }
}

using Tile = void (*)(const float *, long, const float *, long, float *, long);
template <int B, int... R>
static constexpr auto tiles(std::integer_sequence<int, R...>) {
    struct Table { Tile of[sizeof...(R)]; };
    return Table{{tile<R + 1, B>...}};
}
template <int B, int R>
static constexpr auto TILES = tiles<B>(std::make_integer_sequence<int, R>());

// Rows x [M, K] times the rows ``of`` of w [N, K], to out [M, N].
static void product(const float *w, long N, long K, const float *x, long M, Range of, float *out) {
    const long blocks = (M + WITH_TWO - 1) / WITH_TWO;
    while (of.from < of.to) {
        const long left = of.to - of.from, width = M <= WITH_FOUR && left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const Tile *tiles = width == 4   ? TILES<4, WITH_FOUR>.of
                            : width == 2 ? TILES<2, WITH_TWO>.of
                                         : TILES<1, WITH_TWO>.of;
        for (long block = 0; block < blocks; block++) {
            const Range rows = share(M, block, blocks);
            tiles[rows.to - rows.from - 1](w + of.from * K, K, x + rows.from * K, K, out + rows.from * N + of.from, N);
        }
        of.from += width;
    }
}

// Vectors that are not read again before they would have left the cache. Only where p is aligned.
static inline void stream(float *p, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)v);
#else
    store(p, v);
#endif
}
static inline void streamed() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

// out [R][2 * VL] (stride ldo) = the sums over M of a [M][PANEL] times b [M][2 * VL].
template <int R, bool STREAM>
static void outer(const float *a, const float *b, long M, float *out, long ldo) {
    Vec acc[R][2] = {};
    for (long m = 0; m < M; m++, a += PANEL, b += 2 * VL) {
        const Vec first = load(b), second = load(b + VL);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            acc[r][0] += a[r] * first;
            acc[r][1] += a[r] * second;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++)
            STREAM ? stream(out + r * ldo + n * VL, acc[r][n]) : store(out + r * ldo + n * VL, acc[r][n]);
}

using Outer = void (*)(const float *, const float *, long, float *, long);
template <bool STREAM, int... R>
static constexpr auto outers(std::integer_sequence<int, R...>) {
    struct Table { Outer of[sizeof...(R)]; };
    return Table{{outer<R + 1, STREAM>...}};
}
template <bool STREAM>
static constexpr auto OUTERS = outers<STREAM>(std::make_integer_sequence<int, PANEL>());

// Columns from.. of x [M, N] (strides row, column) as [M][width], missing ones as zeros.
static void pack(const float *x, long M, long N, long row, long column, long from, long width, float *to) {
    const long count = std::min(width, N - from);
    x += from * column;
    for (long m = 0; m < M; m++, x += row, to += width) {
        if (column == 1) std::copy_n(x, count, to);
        else for (long n = 0; n < count; n++) to[n] = x[n * column];
        std::fill(to + count, to + width, 0.0f);
    }
}

// This thread's share of n, in whole vectors.
static Range vectors(long n) {
    const Range of = share((n + VL - 1) / VL, omp_get_thread_num(), omp_get_num_threads());
    return {of.from * VL, std::min(of.to * VL, n)};
}

extern "C" {
struct Expert { const float *gate, *up, *down; };  // [F, H], [F, H], [H, F]
struct Experts {
    const Expert *experts;
    int64_t number, hidden, inner;
};
}

// In each thread: of rows [.., H] those of each expert, counts[e] from firsts[e] on and N in all, to the same rows of
// outputs [.., H], of which the thread fills columns ``vectors(H)``; scratch [2, N, F].
static void run(const Experts &of, const int64_t *firsts, const int64_t *counts, long N, const float *rows,
                float *outputs, float *scratch) {
    const long H = of.hidden, F = of.inner;
    const Range inner = vectors(F), hidden = vectors(H);
    float *activated = scratch;
    for (long e = 0; e < of.number; activated += counts[e++] * F) {
        const float *x = rows + firsts[e] * H;
        product(of.experts[e].gate, F, H, x, counts[e], inner, activated);
        product(of.experts[e].up, F, H, x, counts[e], inner, activated + N * F);
        for (long row = 0; row < counts[e]; row++) {
            float *gate = activated + row * F, *up = gate + N * F;
            long f = inner.from;
            for (; f + VL <= inner.to; f += VL)
                store(gate + f, load(gate + f) / (1.0f + exponential(-load(gate + f))) * load(up + f));
            for (; f < inner.to; f++) gate[f] = gate[f] / (1.0f + std::exp(-gate[f])) * up[f];
        }
    }
#pragma omp barrier
    activated = scratch;
    for (long e = 0; e < of.number; activated += counts[e++] * F)
        product(of.experts[e].down, H, F, activated, counts[e], hidden, outputs + firsts[e] * H);
}

extern "C" {

void run_experts(const Experts *experts, const int64_t *firsts, const int64_t *counts, int64_t N, const float *rows,
                 float *outputs, float *scratch, int32_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    run(*experts, firsts, counts, N, rows, outputs, scratch);
}

// Move memory into huge pages where the system can: what streams from there is read faster by 7 to 14 %.
void want_huge_pages(const char *memory, int64_t bytes) {
#ifdef __linux__
    constexpr uintptr_t page = 2 << 20;
    constexpr int collapse = 25;  // MADV_COLLAPSE, Linux 6.1; older headers lack it
    for (uintptr_t at = (uintptr_t)memory / page * page; at < (uintptr_t)memory + bytes; at += page)
        madvise((void *)at, page, collapse);
#endif
}

// Tokens [T, H] by a router [E, H]: logits [T, E], the experts chosen [T, K], best first, and their weights [T, K].
void route(const float *router, int64_t E, int64_t H, int64_t K, const float *tokens, int64_t T, int64_t *chosen,
           float *weights, float *logits) {
    product(router, E, H, tokens, T, {0, E}, logits);
    for (long t = 0; t < T; t++) choose(logits + t * E, E, K, chosen + t * K, weights + t * K);
}

// Tokens [T, H] through the experts chosen [T, K] for them, best first, by their weights [T, K]: mixed [T, H], and the
// rows of each expert, counts [E]. The weights of experts that nobody chose may be null. scratch [T*K, 2*F + 2*H]
void mix(const Experts *experts, int64_t T, int64_t K, const int64_t *chosen, const float *weights,
         const float *tokens, float *mixed, int64_t *counts, float *scratch, int32_t threads) {
    const long E = experts->number, H = experts->hidden, slots = T * K;
    float *rows = scratch, *outputs = rows + slots * H, *rest = outputs + slots * H;
    std::vector<int64_t> firsts(E), next, place(slots);
    std::fill(counts, counts + E, 0);
    for (long slot = 0; slot < slots; slot++) counts[chosen[slot]]++;
    std::exclusive_scan(counts, counts + E, firsts.begin(), int64_t(0));
    next = firsts;
    for (long slot = 0; slot < slots; slot++) {
        place[slot] = next[chosen[slot]]++;
        std::copy_n(tokens + slot / K * H, H, rows + place[slot] * H);
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        run(*experts, firsts.data(), counts, slots, rows, outputs, rest);
        const Range hidden = vectors(H);
        for (long t = 0; t < T; t++) {
            float *to = mixed + t * H;
            std::fill(to + hidden.from, to + hidden.to, 0.0f);
            for (long k = 0; k < K; k++) {
                const long slot = t * K + (K == 2 ? 1 - k : k);  // of two, the lesser weight first: see model/moe.py
                const float weight = weights[slot], *from = outputs + place[slot] * H;
                for (long h = hidden.from; h < hidden.to; h++) to[h] = std::fma(weight, from[h], to[h]);
            }
        }
    }
}

// Floats of scratch memory for a gradient.
int64_t gradient_scratch(int64_t M, int64_t K, int32_t threads) {
    return ((K + 2 * VL - 1) / (2 * VL) * (2 * VL) + threads * PANEL) * M;
}

// The gradient [N, K] of a weight, from that of its outputs, grad [M, N], and its inputs, x [M, K], both of any strides
// (row, column).
void weight_gradient(const float *grad, const int64_t *grad_strides, const float *x, const int64_t *x_strides,
                     int64_t M, int64_t N, int64_t K, float *out, float *scratch, int32_t threads) {
    constexpr long WIDTH = 2 * VL;
    const long columns = (K + WIDTH - 1) / WIDTH, panels = (N + PANEL - 1) / PANEL;
    const bool aligned = K % VL == 0 && (uintptr_t)out % sizeof(Vec) == 0;
    const auto &outers = aligned ? OUTERS<true>.of : OUTERS<false>.of;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (long c = 0; c < columns; c++)
            pack(x, M, K, x_strides[0], x_strides[1], c * WIDTH, WIDTH, scratch + c * WIDTH * M);
        float *panel = scratch + (columns * WIDTH + omp_get_thread_num() * PANEL) * M, rest[PANEL * WIDTH];
#pragma omp for schedule(static)
        for (long p = 0; p < panels; p++) {
            const long first = p * PANEL, rows = std::min<long>(PANEL, N - first);
            pack(grad, M, N, grad_strides[0], grad_strides[1], first, PANEL, panel);
            for (long c = 0; c < columns; c++) {
                const long left = K - c * WIDTH;
                float *to = out + first * K + c * WIDTH;
                if (left >= WIDTH) {
                    outers[rows - 1](panel, scratch + c * WIDTH * M, M, to, K);
                    continue;
                }
                OUTERS<false>.of[rows - 1](panel, scratch + c * WIDTH * M, M, rest, WIDTH);
                for (long row = 0; row < rows; row++) std::copy_n(rest + row * WIDTH, left, to + row * K);
            }
        }
        streamed();
    }
}

// Backward of the weighted sum of a token's slots (model/moe.py, combine), in one pass. grad [T, H] of the sums; outputs
// [T*K, H] and order [T*K] of the sorted slots; weights [T, K]. To of_outputs [T*K, H] and of_weights [T, K].
void combine_gradients(const float *grad, const float *outputs, const int64_t *order, const float *weights,
                       int64_t slots, int64_t K, int64_t H, float *of_outputs, float *of_weights, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < slots; row++) {
        const int64_t slot = order[row];
        const float *g = grad + slot / K * H, *y = outputs + row * H, weight = weights[slot];
        float *to = of_outputs + row * H;
        Vec product[2] = {};
        long h = 0;
        for (; h + 2 * VL <= H; h += 2 * VL)
            for (int n = 0; n < 2; n++) {
                const Vec of = load(g + h + n * VL);
                product[n] += of * load(y + h + n * VL);
                store(to + h + n * VL, of * weight);
            }
        float total = sum(product[0] + product[1]);
        for (; h < H; h++) {
            total += g[h] * y[h];
            to[h] = g[h] * weight;
        }
        of_weights[slot] = total;
    }
}
}
