// One pass of a LLaMA with mixture layers over the new tokens of many sequences, for CPUs; see inference/native.py.
//
// Weights are packed in pairs of panels: of a projection [N, K], pair p holds rows 2*p*VL .. 2*p*VL+2*VL-1 as [K][2*VL],
// missing ones as zeros, so that weights are read in the order they lie, once for each block of tokens. Of gate and up,
// a pair holds VL rows of each.
//
// Every number depends on its own token and sequence alone: sums run in one order, whatever the size of the batch.
// So a sequence gets the same bits in any company and in chunks of any size.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <omp.h>
#include <sys/mman.h>

#include "routing.h"
#include "vectors.h"

#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;
#else
constexpr int MAX_ROWS = 6;
#endif
constexpr int PAIR = 2 * VL;

typedef uint32_t Word __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t Half __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef int8_t Byte __attribute__((vector_size(VL), aligned(1), may_alias));
struct Bf16 { uint16_t bits; };

static inline Vec load(const Bf16 *p) {
    return (Vec)(__builtin_convertvector(*(const Half *)p, Word) << 16);
}
static inline Vec load(const int8_t *p) {  // GCC converts bytes one by one if left to it
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const Byte *)p, Int), Vec);
#endif
}

static inline float value(float x) { return x; }
static inline float value(Bf16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float result;
    memcpy(&result, &word, 4);
    return result;
}
static inline void assign(float &to, float x) { to = x; }
static inline void assign(Bf16 &to, float x) {  // to the nearest, ties to even
    uint32_t word;
    memcpy(&word, &x, 4);
    to.bits = std::isnan(x) ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

static inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < VL; i++) total += v[i];
    return total;
}

// Products of MR rows x (stride ldx) with NP panels, to out [MR][NP * VL]. Few rows wait for memory, so weights are asked
// for long before they are needed, across the pages at which the hardware stops looking ahead.
template <int MR, int NP, class W>
static void tile(const float *x, long ldx, const void *weights, long K, float *out) {
    constexpr int AHEAD = 8192 / sizeof(W), WIDTH = NP * VL;
    const W *w = (const W *)weights;
    Vec acc[MR][NP];
#pragma GCC unroll 32
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int n = 0; n < NP; n++) acc[m][n] = Vec{};
    for (long k = 0; k < K; k++, w += PAIR) {
        Vec b[NP];
#pragma GCC unroll 4
        for (int n = 0; n < NP; n++) {
            const W *from = w + n / 2 * K * PAIR + n % 2 * VL;
            b[n] = load(from);
            __builtin_prefetch(from + AHEAD, 0, 2);
        }
#pragma GCC unroll 32
        for (int m = 0; m < MR; m++) {
            Vec a = all(x[m * ldx + k]);
#pragma GCC unroll 4
            for (int n = 0; n < NP; n++) acc[m][n] += a * b[n];
        }
    }
#pragma GCC unroll 32
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int n = 0; n < NP; n++) store(out + m * WIDTH + n * VL, acc[m][n]);
}

using Tile = void (*)(const float *, long, const void *, long, float *);
template <int NP, class W, int... M>
static constexpr auto tiles(std::integer_sequence<int, M...>) {
    struct Table { Tile of[sizeof...(M)]; };
    return Table{{tile<M + 1, NP, W>...}};
}
template <int NP, class W, int MR>
static constexpr auto TILES = tiles<NP, W>(std::make_integer_sequence<int, MR>());

enum Type { FP32, BF16, INT8 };
static constexpr int BYTES[] = {4, 2, 1};
// Few rows do not fill the multipliers' pipelines with one pair of panels, so they take two.
static constexpr int FEW_ROWS = 2;
struct Kernels { const Tile *few, *some; };
template <class W>
static constexpr Kernels KERNELS = {TILES<4, W, FEW_ROWS>.of, TILES<2, W, MAX_ROWS>.of};
static const Kernels KERNELS_OF[] = {KERNELS<float>, KERNELS<Bf16>, KERNELS<int8_t>};

extern "C" {
// Packed [N, K]; scale [N, padded]: of each output, for int8 only.
struct Weights { const void *data; const float *scale; };
struct Layer {
    const float *input_norm, *post_norm, *router;  // router [E, H] or null: one dense feed-forward
    Weights qkv, out;
    const Weights *gate_up, *down;                 // of each expert
    void *keys, *values;                           // [kv tokens, kv heads, D]
    int32_t experts, top_k, inner, pad;
};
struct Model {
    const Layer *layers;
    const float *final_norm, *cos, *sin;           // cos, sin [positions, D]
    Weights head;
    int32_t num_layers, hidden, heads, kv_heads, head_dim, vocab, type, cache_type;
    float eps, scaling;
};
struct Pass {
    const float *embeddings;                       // [T, H]
    const int32_t *starts, *positions;             // [T] where the token's sequence begins in the cache; its position
    const int32_t *ready;                          // [n] rows that want logits
    float *logits;                                 // [n, vocab, padded]
    int32_t *chosen;                               // [sparse layers, T, K]
    char *scratch;
    int32_t tokens, num_ready, threads, pad;
};
}

static long padded(long n) { return (n + PAIR - 1) / PAIR * PAIR; }

// Rows x [M, K] times pairs of panels; done(row, column, values) gets the PAIR outputs of a row at a time.
template <class Done>
static void product(int type, const float *x, long ldx, long M, const Weights &w, long K, Range pairs, Done done) {
    alignas(64) float out[MAX_ROWS * PAIR];
    const Kernels &kernels = KERNELS_OF[type];
    const long blocks = (M + MAX_ROWS - 1) / MAX_ROWS;
    for (long pair = pairs.from; pair < pairs.to;) {
        const long taken = M <= FEW_ROWS && pair + 1 < pairs.to ? 2 : 1, width = taken * PAIR;
        const char *data = (const char *)w.data + pair * K * PAIR * BYTES[type];
        const float *scale = w.scale ? w.scale + pair * PAIR : nullptr;
        for (long block = 0; block < blocks; block++) {
            const Range rows = share(M, block, blocks);
            const long count = rows.to - rows.from;
            (taken > 1 ? kernels.few : kernels.some)[count - 1](x + rows.from * ldx, ldx, data, K, out);
            for (long m = 0; m < count; m++) {
                float *values = out + m * width;
                if (scale)
                    for (int i = 0; i < width; i += VL) store(values + i, load(values + i) * load(scale + i));
                for (int i = 0; i < width; i += PAIR) done(rows.from + m, pair * PAIR + i, values + i);
            }
        }
        pair += taken;
    }
}

static void rms_norm(const float *x, const float *weight, float eps, long H, float *out) {
    Vec squares{};
    long i = 0;
    for (; i + VL <= H; i += VL) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < H; i++) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / H + eps);
    for (i = 0; i < H; i++) out[i] = weight[i] * (x[i] * scale);
}

// Sums of each of N vectors, in order; N == VL at the outset.
template <int N>
static inline Vec sums(Vec *v) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        Int even, odd;
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
#pragma GCC unroll 16
        for (int i = 0; i < N / 2; i++)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
        return sums<N / 2>(v);
    }
}

// Scores [seen, padded] to e to the (score - the largest), zeros in the padding; returns one over their sum.
static inline float soften(float *scores, long seen, Vec most, Int lane) {
    float top = most[0];
    for (int i = 1; i < VL; i++) top = std::max(top, most[i]);
    Vec total{};
    for (long j = 0; j < seen; j += VL) {
        Vec p = exponential(load(scores + j) - top);
        p = lane < int32_t(std::min<long>(VL, seen - j)) ? p : Vec{};
        total += p;
        store(scores + j, p);
    }
    return 1.0f / sum(total);
}

// One head of one token: query [D] over ``seen`` keys and values (rows of ``stride``), to out [D]. D is DV vectors, or,
// with DV = 0, anything.
template <int DV, class C>
static void attend(const float *query, const C *keys, const C *values, long stride, long seen, long D, float scaling,
                   float *scores, float *out) {
    Int lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    const Vec lowest = all(-std::numeric_limits<float>::infinity());
    Vec most = lowest, q[DV + 1];
    for (int d = 0; d < DV; d++) q[d] = load(query + d * VL);
    for (long j = 0; j < seen; j += VL) {
        Vec partial[VL];
        const long count = std::min<long>(VL, seen - j);
#pragma GCC unroll 16
        for (long n = 0; n < VL; n++) {
            const C *key = keys + (j + std::min(n, count - 1)) * stride;
            Vec acc{};
#pragma GCC unroll 16
            for (int d = 0; d < DV; d++) acc += q[d] * load(key + d * VL);
            if constexpr (!DV)
                for (long d = 0; d < D; d++) acc[0] += query[d] * value(key[d]);
            partial[n] = acc;
        }
        Vec score = sums<VL>(partial) * scaling;
        score = lane < int32_t(count) ? score : lowest;
        most = score > most ? score : most;
        store(scores + j, score);
    }
    const float share = soften(scores, seen, most, lane);
    if constexpr (DV > 0) {
        constexpr int CHAINS = DV > 2 ? 1 : 4 / DV;  // sums long enough in the making to fill the pipelines
        Vec acc[CHAINS][DV] = {};
        long j = 0;
        for (; j + CHAINS <= seen; j += CHAINS)
#pragma GCC unroll 4
            for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 16
                for (int d = 0; d < DV; d++) acc[c][d] += scores[j + c] * load(values + (j + c) * stride + d * VL);
        for (int c = 0; j < seen; j++, c++)
            for (int d = 0; d < DV; d++) acc[c][d] += scores[j] * load(values + j * stride + d * VL);
        for (int d = 0; d < DV; d++) {
            for (int c = 1; c < CHAINS; c++) acc[0][d] += acc[c][d];
            store(out + d * VL, acc[0][d] * share);
        }
    } else {
        for (long d = 0; d < D; d++) {
            float acc = 0;
            for (long j = 0; j < seen; j++) acc += scores[j] * value(values[j * stride + d]);
            out[d] = acc * share;
        }
    }
}

template <class C>
static auto attend_of(long D) {
    switch (D % VL ? 0 : D / VL) {
        case 1: return attend<1, C>;
        case 2: return attend<2, C>;
        case 4: return attend<4, C>;
        case 6: return attend<6, C>;
        case 8: return attend<8, C>;
        case 16: return attend<16, C>;
        default: return attend<0, C>;
    }
}

// Rotary embedding of one head [D], halves rotated into each other.
template <class C>
static void rotate(const float *x, const float *cos, const float *sin, long D, C *out) {
    const long half = D / 2;
    for (long i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        assign(out[i], a * cos[i] - b * sin[i]);
        assign(out[i + half], b * cos[i + half] + a * sin[i + half]);
    }
}

struct Scratch {
    float *residual, *normed, *qkv, *mixed, *rows, *activated, *weights, *scores;
    int32_t *experts, *order, *firsts;
    long qkv_width, mixed_width, inner_width, score_width, order_width, max_k, max_e;

    // Also measures: without memory, returns the bytes needed.
    long lay(const Model &m, long T, long ready, long longest, int threads, char *memory) {
        long inner = 0;
        max_k = max_e = 1;
        for (int l = 0; l < m.num_layers; l++) {
            inner = std::max<long>(inner, m.layers[l].inner);
            max_k = std::max<long>(max_k, m.layers[l].top_k);
            max_e = std::max<long>(max_e, m.layers[l].experts);
        }
        const long H = padded(m.hidden);
        qkv_width = padded((m.heads + 2 * m.kv_heads) * m.head_dim);
        mixed_width = padded(m.heads * m.head_dim);
        inner_width = padded(2 * inner) / 2 + VL;
        score_width = padded(longest);
        order_width = T * max_k;
        long used = 0;
        auto take = [&](auto *&pointer, long count) {
            pointer = (std::remove_reference_t<decltype(pointer)>)(memory + used);
            used += (count * 4 + 63) / 64 * 64;
        };
        take(residual, T * H);
        take(normed, std::max(T, ready) * H);
        take(qkv, T * qkv_width);
        take(mixed, T * mixed_width);
        take(rows, T * max_k * H);
        take(activated, T * max_k * inner_width);
        take(weights, T * max_k);
        take(experts, T * max_k);
        take(scores, threads * score_width);
        take(order, threads * order_width);
        take(firsts, threads * (max_e + 1));
        return used;
    }
};

// Tokens sorted by expert: order [T*K] slots, firsts [E+1] where each expert's begin.
static void sort_slots(const int32_t *experts, long slots, int E, int32_t *order, int32_t *firsts) {
    std::fill(firsts, firsts + E + 1, 0);
    for (long s = 0; s < slots; s++) firsts[experts[s] + 1]++;
    for (int e = 0; e < E; e++) firsts[e + 1] += firsts[e];
    for (long s = 0; s < slots; s++) order[firsts[experts[s]]++] = int32_t(s);
    for (int e = E; e > 0; e--) firsts[e] = firsts[e - 1];
    firsts[0] = 0;
}

template <class C>
static void attention(const Model &m, const Layer &layer, const Pass &pass, const Scratch &s, int thread) {
    const long D = m.head_dim, stride = m.kv_heads * D, group = m.heads / m.kv_heads;
    C *keys = (C *)layer.keys, *values = (C *)layer.values;
#pragma omp for schedule(static)
    for (long t = 0; t < pass.tokens; t++) {
        float *row = s.qkv + t * s.qkv_width;
        const long position = pass.positions[t], place = (pass.starts[t] + position) * stride;
        const float *cos = m.cos + position * D, *sin = m.sin + position * D;
        for (long h = 0; h < m.heads; h++) rotate(row + h * D, cos, sin, D, row + h * D);
        row += m.heads * D;
        for (long h = 0; h < m.kv_heads; h++) rotate(row + h * D, cos, sin, D, keys + place + h * D);
        row += stride;
        for (long i = 0; i < stride; i++) assign(values[place + i], row[i]);
    }
    const auto run = attend_of<C>(D);
#pragma omp for schedule(dynamic, 4)
    for (long unit = 0; unit < pass.tokens * m.heads; unit++) {
        const long t = unit / m.heads, h = unit % m.heads;
        const long begin = pass.starts[t] * stride + h / group * D;
        run(s.qkv + t * s.qkv_width + h * D, keys + begin, values + begin, stride, pass.positions[t] + 1L, D,
            m.scaling, s.scores + thread * s.score_width, s.mixed + t * s.mixed_width + h * D);
    }
}

static void feed_forward(const Model &m, const Layer &layer, const Pass &pass, const Scratch &s, int32_t *chosen,
                         int thread, int threads) {
    const long H = padded(m.hidden), E = layer.experts, K = layer.top_k, slots = pass.tokens * K;
    const long pairs = padded(2 * layer.inner) / PAIR;
#pragma omp for schedule(static)
    for (long t = 0; t < pass.tokens; t++) {
        float *normed = s.normed + t * H;
        rms_norm(s.residual + t * H, layer.post_norm, m.eps, m.hidden, normed);
        if (!layer.router) {
            s.experts[t] = 0, s.weights[t] = 1;
            continue;
        }
        float logits[256];
        for (long e = 0; e < E; e++) {
            const float *row = layer.router + e * m.hidden;
            Vec acc{};
            long i = 0;
            for (; i + VL <= m.hidden; i += VL) acc += load(normed + i) * load(row + i);
            float total = sum(acc);
            for (; i < m.hidden; i++) total += normed[i] * row[i];
            logits[e] = total;
        }
        choose(logits, E, K, s.experts + t * K, s.weights + t * K);
    }
    int32_t *order = s.order + thread * s.order_width, *firsts = s.firsts + thread * (s.max_e + 1);
    sort_slots(s.experts, slots, E, order, firsts);
    if (chosen && !thread) memcpy(chosen, s.experts, slots * 4);
    const bool gather = K > 1 || E > 1;
    const float *rows = gather ? s.rows : s.normed;
    if (gather) {
#pragma omp for schedule(static)
        for (long slot = 0; slot < slots; slot++) memcpy(s.rows + slot * H, s.normed + order[slot] / K * H, H * 4);
    }
    for (long e = 0; e < E; e++) {
        const long first = firsts[e], count = firsts[e + 1] - first;
        if (!count) continue;
        product(m.type, rows + first * H, H, count, layer.gate_up[e], m.hidden, share(pairs, thread, threads),
                [&](long row, long column, const float *values) {
                    const Vec gate = load(values), up = load(values + VL);
                    store(s.activated + (first + row) * s.inner_width + column / 2,
                          gate / (1.0f + exponential(-gate)) * up);
                });
    }
#pragma omp barrier
    for (long e = 0; e < E; e++) {
        const long first = firsts[e], count = firsts[e + 1] - first;
        if (!count) continue;
        product(m.type, s.activated + first * s.inner_width, s.inner_width, count, layer.down[e], layer.inner,
                share(H / PAIR, thread, threads), [&](long row, long column, const float *values) {
                    const int32_t slot = order[first + row];
                    float *to = s.residual + slot / K * H + column;
                    const float weight = s.weights[slot];
                    store(to, load(to) + weight * load(values));
                    store(to + VL, load(to + VL) + weight * load(values + VL));
                });
    }
#pragma omp barrier
}

extern "C" {

int32_t vector_length() { return VL; }

// Ask for huge pages, before memory is first touched: weights are read faster by up to 40 %.
void want_huge_pages(char *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, begin = ((uintptr_t)memory + page - 1) / page * page;
    madvise((void *)begin, (uintptr_t)memory + bytes - begin, MADV_HUGEPAGE);
#endif
}

int64_t scratch_bytes(const Model *m, int32_t tokens, int32_t ready, int32_t longest, int32_t threads) {
    return Scratch().lay(*m, tokens, ready, longest, threads, nullptr);
}

// ``longest``: the most keys that a token of this pass sees.
void forward(const Model *model, const Pass *given, int32_t longest) {
    const Model &m = *model;
    const Pass &pass = *given;
    const long H = padded(m.hidden), T = pass.tokens;
    Scratch s;
    s.lay(m, T, pass.num_ready, longest, pass.threads, pass.scratch);
#pragma omp parallel num_threads(pass.threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int32_t *chosen = pass.chosen;
        for (int l = 0; l < m.num_layers; l++) {
            const Layer &layer = m.layers[l];
#pragma omp for schedule(static)
            for (long t = 0; t < T; t++) {
                if (!l) memcpy(s.residual + t * H, pass.embeddings + t * m.hidden, m.hidden * 4);
                rms_norm(s.residual + t * H, layer.input_norm, m.eps, m.hidden, s.normed + t * H);
            }
            product(m.type, s.normed, H, T, layer.qkv, m.hidden, share(s.qkv_width / PAIR, thread, threads),
                    [&](long row, long column, const float *values) {
                        memcpy(s.qkv + row * s.qkv_width + column, values, PAIR * 4);
                    });
#pragma omp barrier
            if (m.cache_type == BF16) attention<Bf16>(m, layer, pass, s, thread);
            else attention<float>(m, layer, pass, s, thread);
            product(m.type, s.mixed, s.mixed_width, T, layer.out, m.heads * m.head_dim,
                    share(H / PAIR, thread, threads), [&](long row, long column, const float *values) {
                        float *to = s.residual + row * H + column;
                        store(to, load(to) + load(values));
                        store(to + VL, load(to + VL) + load(values + VL));
                    });
#pragma omp barrier
            feed_forward(m, layer, pass, s, layer.router ? chosen : nullptr, thread, threads);
            if (layer.router) chosen += T * layer.top_k;
        }
#pragma omp for schedule(static)
        for (long n = 0; n < pass.num_ready; n++)
            rms_norm(s.residual + pass.ready[n] * H, m.final_norm, m.eps, m.hidden, s.normed + n * H);
        const long vocab = padded(m.vocab);
        product(m.type, s.normed, H, pass.num_ready, m.head, m.hidden, share(vocab / PAIR, thread, threads),
                [&](long row, long column, const float *values) {
                    memcpy(pass.logits + row * vocab + column, values, PAIR * 4);
                });
    }
}
}
