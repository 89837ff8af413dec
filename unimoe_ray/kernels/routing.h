// Which experts a token goes to.

#pragma once

#include <cmath>

// The largest K of E logits, best first, and their softmax; as in model/routing.py two weights add up to 1 exactly.
template <class Index>
static void choose(const float *logits, long E, long K, Index *experts, float *weights) {
    for (long k = 0; k < K; k++) {
        long best = -1;
        for (long e = 0; e < E; e++) {
            bool taken = false;
            for (long other = 0; other < k; other++) taken |= experts[other] == e;
            // NaN is above all, as in torch.topk
            if (!taken && (best < 0 || logits[e] > logits[best] || (std::isnan(logits[e]) && !std::isnan(logits[best]))))
                best = e;
        }
        experts[k] = best;
    }
    float total = 0;
    for (long k = 0; k < K; k++) total += weights[k] = std::exp(logits[experts[k]] - logits[experts[0]]);
    for (long k = 0; k < K; k++) weights[k] /= total;
    if (K == 2) {
        weights[0] = 1 - weights[1];
        weights[1] = 1 - weights[0];
    }
}
