// The choice of experts, for kernels/cpu_router.py: logits and scores [rows, experts] fp32, chosen the same in bytes.
#include "vectors.h"

extern "C" {

// chosen: the k largest of each row, the first among equals. scores: the softmax over these, 0 elsewhere, or over all.
void route(int64_t rows, int64_t experts, int64_t k, int64_t over_all, const float *logits, float *scores, uint8_t *chosen,
           int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * experts > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    const float *row = logits + n * experts;
    float *to = scores + n * experts;
    uint8_t *mark = chosen + n * experts;
    std::fill(mark, mark + experts, 0);
    float largest = 0;
    for (int64_t place = 0; place < k; place++) {
      int64_t best = -1;
      for (int64_t e = 0; e < experts; e++)
        if (!mark[e] && (best < 0 || row[e] > row[best] || row[e] != row[e])) best = e;
      mark[best] = 1;
      if (place == 0) largest = row[best];
    }
    Vector sum{};
    each_vector(experts, [=, &sum](int64_t e, auto count) {
      alignas(4 * LANES) float counts[LANES] = {};
      for (int64_t lane = 0; lane < count; lane++) counts[lane] = over_all || mark[e + lane];
      const Vector power = exponential(load_first(row + e, count) - largest) * load(counts);
      sum += power;
      store_first(to + e, power, count);
    });
    const float scale = 1 / total(sum);
    each_vector(experts, [=](int64_t e, auto count) { store_first(to + e, load_first(to + e, count) * scale, count); });
  }
}

// dlogits = scores * (dscores - sum of scores * dscores)
void route_backward(int64_t rows, int64_t experts, const float *scores, const float *dscores, float *dlogits,
                    int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * experts > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    const float *of = scores + n * experts, *d = dscores + n * experts;
    Vector sum{};
    each_vector(experts, [=, &sum](int64_t e, auto count) { sum += load_first(of + e, count) * load_first(d + e, count); });
    const float mean = total(sum);
    each_vector(experts, [=](int64_t e, auto count) {
      store_first(dlogits + n * experts + e, load_first(of + e, count) * (load_first(d + e, count) - mean), count);
    });
  }
}

}  // extern "C"
