// Cross-entropy, for kernels/cpu_cross_entropy.py. Logits: [rows, vocabulary] fp32, side by side, of a multiple of 16 tokens.
#include "vectors.h"

extern "C" {

// Of each row its largest logit, the sum of e^(logit - largest), and the logit of its target, 0 where that is not among
// these `vocabulary` tokens, whose first is `first`.
void cross_entropy(int64_t rows, int64_t vocabulary, const float *logits, const int64_t *targets, int64_t first,
                   float *largest, float *sums, float *chosen, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * vocabulary > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    const float *row = logits + n * vocabulary;
    const float top = largest_of(row, vocabulary);
    Vector sum{};
    for (int64_t j = 0; j < vocabulary; j += LANES) sum += exponential(load(row + j) - top);
    const int64_t target = targets[n] - first;
    largest[n] = top;
    sums[n] = total(sum);
    chosen[n] = 0 <= target && target < vocabulary ? row[target] : 0.0f;
  }
}

// In place of the logits their gradients: (e^(logit - log_sum) - 1 if it is the target's) * dloss.
void cross_entropy_backward(int64_t rows, int64_t vocabulary, float *logits, const int64_t *targets, int64_t first,
                            const float *log_sums, const float *dloss, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * vocabulary > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    float *row = logits + n * vocabulary;
    const float log_sum = log_sums[n], scale = dloss[n];
    for (int64_t j = 0; j < vocabulary; j += LANES) store(row + j, exponential(load(row + j) - log_sum) * scale);
    const int64_t target = targets[n] - first;
    if (0 <= target && target < vocabulary) row[target] -= scale;
  }
}

}  // extern "C"
