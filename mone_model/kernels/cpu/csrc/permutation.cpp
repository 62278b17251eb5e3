// Tokens sorted by expert and back, for kernels/cpu_permutation.py. Rows of fp32; chosen [tokens, experts] in bytes.
#include <vector>

#include "vectors.h"

namespace {

// f(token, expert, row) for each choice; rows go expert by expert.
template <class F>
void each_row(int64_t tokens, int64_t experts, const uint8_t *chosen, F f) {
  std::vector<int64_t> next(experts + 1);
  for (int64_t n = 0; n < tokens; n++)
    for (int64_t e = 0; e < experts; e++) next[e + 1] += chosen[n * experts + e];
  for (int64_t e = 0; e < experts; e++) next[e + 1] += next[e];
  for (int64_t n = 0; n < tokens; n++)
    for (int64_t e = 0; e < experts; e++)
      if (chosen[n * experts + e]) f(n, e, next[e]++);
}

}  // namespace

extern "C" {

// For each row whose token it is, and its weight; probs may be null.
void list_rows(int64_t tokens, int64_t experts, const uint8_t *chosen, const float *probs, int64_t *token_of,
               float *prob_of, int64_t) {
  each_row(tokens, experts, chosen, [=](int64_t n, int64_t e, int64_t row) {
    token_of[row] = n;
    if (probs) prob_of[row] = probs[n * experts + e];
  });
}

// The weights' gradients back to their places; 0 where nothing was chosen.
void unlist_probs(int64_t tokens, int64_t experts, const uint8_t *chosen, const float *dprob_of, float *dprobs, int64_t) {
  std::fill(dprobs, dprobs + tokens * experts, 0.0f);
  each_row(tokens, experts, chosen,
           [=](int64_t n, int64_t e, int64_t row) { dprobs[n * experts + e] = dprob_of[row]; });
}

// y[row] = x[token_of[row]]
void take_rows(int64_t rows, int64_t width, const int64_t *token_of, const float *x, float *y, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_WAKING)
  for (int64_t row = 0; row < rows; row++) std::memcpy(y + row * width, x + token_of[row] * width, width * sizeof(float));
}

// x[token] = the sum of its rows of y, in their order.
void add_rows(int64_t rows, int64_t tokens, int64_t width, const int64_t *token_of, const float *y, float *x,
              int64_t threads) {
  std::vector<int64_t> begin(tokens + 1), row_of(rows);
  for (int64_t row = 0; row < rows; row++) begin[token_of[row] + 1]++;
  for (int64_t n = 0; n < tokens; n++) begin[n + 1] += begin[n];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t row = 0; row < rows; row++) row_of[next[token_of[row]]++] = row;
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_WAKING)
  for (int64_t n = 0; n < tokens; n++)
    each_vector(width, [&](int64_t j, auto count) {
      Vector sum{};
      for (int64_t i = begin[n]; i < begin[n + 1]; i++) sum += load_first(y + row_of[i] * width + j, count);
      store_first(x + n * width + j, sum, count);
    });
}

}  // extern "C"
