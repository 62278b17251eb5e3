// The experts of a layer for a few rows, forward only: time is reading weights, and those of dropped neurons are not read.
//
// The gates of an expert with rows are read whole; up and down of the neurons that a row keeps. Tasks are CHUNK neurons of
// an expert, for all of its rows. Shapes as in experts.cpp; weights, inputs and outputs in T, all sums in fp32.
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "products.h"
#include "selection.h"

namespace {

constexpr int64_t CHUNK = 256;

// y = sum_p values[p] (x . up[list[p]]) down[list[p]], four neurons at a time. While one of the two weights is multiplied,
// the other is on its way: no hardware guesses which rows come next.
template <class T>
void add_kept(const float *x, const T *up, const T *down, int64_t width, const uint16_t *list, const float *values,
              int count, float *y) {
  std::fill(y, y + width, 0.0f);
  for (int p = 0; p < count; p += 4) {
    const int last = count - 1;
    const int64_t now[] = {list[p], list[std::min(p + 1, last)], list[std::min(p + 2, last)], list[std::min(p + 3, last)]};
    const int64_t next[] = {list[std::min(p + 4, last)], list[std::min(p + 5, last)], list[std::min(p + 6, last)],
                            list[std::min(p + 7, last)]};
    Vector sums[4] = {};
    for (int64_t k = 0; k < width; k += LANES) {
      const Vector row = held(load(x + k));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __builtin_prefetch(down + now[i] * width + k);
        sums[i] += row * load(up + now[i] * width + k);
      }
    }
    const Four hidden = add_up(sums[0], sums[1], sums[2], sums[3]);
    Vector weights[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) weights[i] = all(p + i < count ? hidden[i] * values[p + i] : 0.0f);
    for (int64_t k = 0; k < width; k += LANES) {
      Vector sum = load(y + k);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __builtin_prefetch(up + next[i] * width + k);
        sum += weights[i] * load(down + now[i] * width + k);
      }
      store(y + k, sum);
    }
  }
}

// The neurons of a chunk whose magnitude reaches the threshold; NaN reaches every one.
void mark_by_threshold(const float *active, int64_t neurons, float threshold, uint16_t *mask) {
  mark(rounded_up(neurons), mask, [&](int j) { return ~(magnitude(load(active + j)) < all(threshold)); });
  if (neurons % WORD != 0) mask[neurons / WORD] &= (1 << neurons % WORD) - 1;
}

}  // namespace

namespace mone {

template <class T>
void decode(int64_t rows, int64_t experts, int64_t width, int64_t neurons, int64_t kept, float threshold,
            const int64_t *rows_of_experts, int64_t activation, const T *x, const T *gate_up, const T *down,
            const float *probs, const float *bias, T *out, uint16_t *masks, int64_t threads) {
  struct Task {
    int64_t expert, row, count, chunk;
  };
  const int64_t padded = rounded_up(neurons), words = words_of(neurons), chunks = (neurons + CHUNK - 1) / CHUNK;
  std::vector<Task> tasks;
  for (int64_t e = 0, row = 0; e < experts; row += rows_of_experts[e], e++)
    for (int64_t chunk = 0; chunk < chunks && rows_of_experts[e] > 0; chunk++)
      tasks.push_back({e, row, rows_of_experts[e], chunk});
  Aligned<float> active(rows * padded), scores(bias ? rows * padded : 0), parts(rows * chunks * width), inputs(std::is_same_v<T, float> ? 0 : rows * width);
  const float *x32 = inputs.data;
  if constexpr (std::is_same_v<T, float>) x32 = x;
  else
    for (int64_t i = 0; i < rows * width; i += LANES) store(inputs.data + i, load(x + i));

  const auto begin = [&](const Task &task) {
    const int64_t first = task.chunk * CHUNK, count = std::min(CHUNK, neurons - first);
    float *gates = active.data + task.row * padded + first;
    multiply(x32 + task.row * width, gate_up + (task.expert * 2 * neurons + first) * width, task.count, width, count, gates,
             padded);
    for (int64_t n = 0; n < task.count; n++, gates += padded) {
      activate(activation, gates, count, gates);
      const float *of_expert = bias ? bias + task.expert * neurons + first : nullptr;
      const float *scored = scores_of(gates, of_expert, count, scores.data + (gates - active.data));
      if (kept == 0) mark_by_threshold(scored, count, threshold, masks + (task.row + n) * words + first / WORD);
    }
  };
  const auto finish = [&](const Task &task) {
    const int64_t first = task.chunk * CHUNK, count = std::min(CHUNK, neurons - first);
    uint16_t list[CHUNK + LANES];
    float values[CHUNK + LANES];
    for (int64_t n = task.row; n < task.row + task.count; n++) {
      const uint16_t *mask = masks + n * words + first / WORD;
      int chosen = 0;
      for (int64_t w = 0; w < words_of(count); w++) chosen += __builtin_popcount(mask[w]);
      list_row(mask, count, list);
      compress_row(active.data + n * padded + first, mask, count, values);
      for (int p = 0; p < chosen; p++) values[p] *= probs[n];
      const T *up = gate_up + ((task.expert * 2 + 1) * neurons + first) * width;
      add_kept(x32 + n * width, up, down + (task.expert * neurons + first) * width, width, list, values, chosen,
               parts.data + (n * chunks + task.chunk) * width);
    }
  };
#pragma omp parallel num_threads(threads)
  {
    if (kept == 0) {
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < tasks.size(); t++) begin(tasks[t]), finish(tasks[t]);
    } else {
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < tasks.size(); t++) begin(tasks[t]);
#pragma omp for
      for (int64_t n = 0; n < rows; n++)
        select((bias ? scores.data : active.data) + n * padded, neurons, kept, FIRST_GUESS, masks + n * words);
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < tasks.size(); t++) finish(tasks[t]);
    }
    // In one order, whichever thread computed what.
#pragma omp for collapse(2)
    for (int64_t n = 0; n < rows; n++)
      for (int64_t k = 0; k < width; k += LANES) {
        Vector sum{};
        for (int64_t chunk = 0; chunk < chunks; chunk++) sum += load(parts.data + (n * chunks + chunk) * width + k);
        store(out + n * width + k, sum);
      }
  }
}

template decltype(decode<float>) decode<float>;
template decltype(decode<BFloat16>) decode<BFloat16>;

}  // namespace mone
