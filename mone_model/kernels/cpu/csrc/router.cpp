// The choice of experts, for kernels/cpu_router.py: logits and scores [rows, experts] fp32, chosen the same in bytes.
#include <limits>

#include "vectors.h"

extern "C" {

// chosen: the k largest of each row, the first among equals. scores: the softmax over these, 0 elsewhere, or over all.
void route(int64_t rows, int64_t experts, int64_t k, int64_t over_all, const float *logits, float *scores, uint8_t *chosen,
           int64_t threads) {
  constexpr float INF = std::numeric_limits<float>::infinity();
  const int64_t padded = rounded_up(experts);
#pragma omp parallel num_threads(threads) if (rows * experts * experts > WORTH_WAKING)
  {
    Aligned<float> row(padded);  // NaN counts as the largest
    std::fill(row.data, row.data + padded, -INF);
    Integers lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
#pragma omp for
    for (int64_t n = 0; n < rows; n++) {
      float *to = scores + n * experts, largest = -INF;
      for (int64_t e = 0; e < experts; e++) {
        const float logit = logits[n * experts + e];
        row.data[e] = logit == logit ? logit : INF;
        largest = std::max(largest, row.data[e]);
      }
      Vector sum{};
      each_vector(experts, [=, &sum, &row](int64_t e, auto count) {
        const Vector here = load(row.data + e);
        const Integers places = lanes + int32_t(e);
        Integers ahead{};  // of each, how many are larger; counted rather than sorted: there is nothing to predict
        for (int64_t other = 0; other < experts; other++) {
          const Vector its = all(row.data[other]);
          ahead -= (its > here) | ((its == here) & (int32_t(other) < places));
        }
        const Integers kept = ahead < all(int32_t(k));
        for (int64_t lane = 0; lane < count; lane++) chosen[n * experts + e + lane] = -kept[lane];
        const Vector power = exponential(here - largest);
        const Vector counts = over_all ? power : choose(kept, power, Vector{});
        sum += counts;
        store_first(to + e, counts, count);
      });
      const float scale = 1 / total(sum);
      each_vector(experts, [=](int64_t e, auto count) { store_first(to + e, load_first(to + e, count) * scale, count); });
    }
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
