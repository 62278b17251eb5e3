// Dense products of rows with the weights of neurons.
#pragma once

#include "vectors.h"

namespace {

constexpr int ROWS = LANES == 16 ? 4 : 3;  // so that sums with four neurons fit into the registers

// gate[r, j] = x[r] . w[j]; writes up to a multiple of four neurons, reading the last again.
template <int COUNT, class T>
void multiply_rows(const float *x, const T *w, int64_t width, int64_t neurons, float *gate, int64_t stride) {
  for (int64_t j = 0; j < neurons; j += 4) {
    const T *weights[4];
    for (int i = 0; i < 4; i++) weights[i] = w + std::min(j + i, neurons - 1) * width;
    Vector sums[COUNT][4] = {};
    for (int64_t k = 0; k < width; k += LANES) {
      Vector rows[COUNT];
#pragma GCC unroll 4
      for (int r = 0; r < COUNT; r++) rows[r] = held(load(x + r * width + k));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const Vector weight = held(load(weights[i] + k));
#pragma GCC unroll 4
        for (int r = 0; r < COUNT; r++) sums[r][i] += rows[r] * weight;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; r++)
      store_some(gate + r * stride + j, add_up(sums[r][0], sums[r][1], sums[r][2], sums[r][3]), 4, false);
  }
}

// One row, with weights that come from memory: one after another, as the hardware expects, and asked for ahead.
template <class T>
void multiply_row(const float *x, const T *w, int64_t width, int64_t neurons, float *gate) {
  constexpr int64_t AHEAD = 4096 / sizeof(T);
  for (int64_t j = 0; j < neurons; j += 4) {
    Vector sums[4];
    for (int i = 0; i < 4; i++) {
      const T *weights = w + std::min(j + i, neurons - 1) * width;
      Vector parts[WORD / LANES] = {};
      for (int64_t k = 0; k < width; k += WORD) {
        __builtin_prefetch(weights + k + AHEAD);
#pragma GCC unroll 4
        for (int p = 0; p < WORD / LANES; p++) parts[p] += load(x + k + p * LANES) * load(weights + k + p * LANES);
      }
      sums[i] = parts[0];
      for (int p = 1; p < WORD / LANES; p++) sums[i] += parts[p];
    }
    store_some(gate + j, add_up(sums[0], sums[1], sums[2], sums[3]), 4, false);
  }
}

// The same for a few rows; the weights are read once.
template <class T>
void multiply(const float *x, const T *w, int64_t count, int64_t width, int64_t neurons, float *gate, int64_t stride) {
  if (count == 1) return multiply_row(x, w, width, neurons, gate);
  constexpr int64_t TOGETHER = 16;  // neurons whose weights stay in L1 for all rows
  for (int64_t j = 0; j < neurons; j += TOGETHER) {
    const int64_t here = std::min(TOGETHER, neurons - j);
    int64_t n = 0;
    const auto rows = [&](auto together) {
      for (; n + together <= count; n += together)
        multiply_rows<together>(x + n * width, w + j * width, width, here, gate + n * stride + j, stride);
    };
    rows(std::integral_constant<int, ROWS>());
    rows(std::integral_constant<int, 2>());
    rows(std::integral_constant<int, 1>());
  }
}

// Rows become columns.
inline void transpose(Vector *square) {
  for (int round = 1; round < LANES; round *= 2) {  // each a perfect shuffle of its two halves
    Vector shuffled[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; i++) {
      Integers low, high;
      for (int lane = 0; lane < LANES; lane++) {
        low[lane] = lane / 2 + lane % 2 * LANES;
        high[lane] = low[lane] + LANES / 2;
      }
      shuffled[2 * i] = __builtin_shuffle(square[i], square[i + LANES / 2], low);
      shuffled[2 * i + 1] = __builtin_shuffle(square[i], square[i + LANES / 2], high);
    }
    std::copy(shuffled, shuffled + LANES, square);
  }
}

constexpr int PANEL = 2 * LANES;            // columns, such as neurons, of which a product is computed at a time
constexpr int TALL = LANES == 16 ? 12 : 6;  // rows whose sums with a panel fit into the registers

// Rows first to first + PANEL of w become columns, [width, PANEL]; in place of rows that are not there the last again.
inline void transpose_panel(const float *w, int64_t first, int64_t rows, int64_t width, float *panel) {
  for (int64_t k = 0; k < width; k += LANES)
    for (int half : {0, LANES}) {
      Vector square[LANES];
      for (int i = 0; i < LANES; i++) square[i] = load(w + std::min(first + half + i, rows - 1) * width + k);
      transpose(square);
      for (int i = 0; i < LANES; i++) store(panel + (k + i) * PANEL + half, square[i]);
    }
}

// y[r] = sum over k < depth of x[r, k] panel[k], or is added to if `add`. x[r, k] lies at r * x_row + k * x_step, row k of the
// panel at k * panel_step, y[r] at r * y_row.
template <int COUNT>
inline void multiply_panel(int64_t depth, const float *x, int64_t x_row, int64_t x_step, const float *panel,
                           int64_t panel_step, float *y, int64_t y_row, bool add = false) {
  Vector sums[COUNT][2] = {};
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; r++) {
      sums[r][0] = load(y + r * y_row);
      sums[r][1] = load(y + r * y_row + LANES);
    }
  }
  for (int64_t k = 0; k < depth; k++) {
    const Vector left = load(panel + k * panel_step), right = load(panel + k * panel_step + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; r++) {
      const Vector value = all(x[r * x_row + k * x_step]);
      sums[r][0] += value * left;
      sums[r][1] += value * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < COUNT; r++) {
    store(y + r * y_row, sums[r][0]);
    store(y + r * y_row + LANES, sums[r][1]);
  }
}

// f(n, together) for `together` rows from row n; a constant.
template <class F>
inline void each_tile(int64_t count, F f) {
  int64_t n = 0;
  const auto rows = [&](auto together) {
    for (; n + together <= count; n += together) f(n, together);
  };
  rows(std::integral_constant<int, TALL>());
  rows(std::integral_constant<int, 4>());
  rows(std::integral_constant<int, 1>());
}

// y[r] += sum over k < depth of x[r, k] w[k] for `count` rows. x[r, k] lies at r * x_row + k * x_step, row k of w, of `width`
// numbers, at k * w_row, y[r] at r * y_row. panel: room for depth * PANEL numbers.
inline void add_product(int64_t count, int64_t depth, const float *x, int64_t x_row, int64_t x_step, const float *w,
                        int64_t w_row, int64_t width, float *panel, float *y, int64_t y_row) {
  for (int64_t column = 0; column < width; column += PANEL) {
    const int64_t columns = std::min<int64_t>(PANEL, width - column);  // a multiple of WORD
    for (int64_t k = 0; k < depth; k++)
      for (int64_t i = 0; i < PANEL; i += LANES)
        store(panel + k * PANEL + i, i < columns ? load(w + k * w_row + column + i) : Vector{});
    each_tile(count, [&](int64_t n, auto together) {
      float tile[TALL * PANEL];
      multiply_panel<together>(depth, x + n * x_row, x_row, x_step, panel, PANEL, tile, PANEL);
      for (int64_t r = 0; r < together; r++)
        for (int64_t i = 0; i < columns; i += LANES) {
          float *to = y + (n + r) * y_row + column + i;
          store(to, load(to) + load(tile + r * PANEL + i));
        }
    });
  }
}

// As `multiply`, for so many rows that transposing the weights pays: nothing is left to add up within vectors. panel: room for
// width * PANEL numbers; rows of gate have room for a multiple of PANEL neurons.
inline void multiply_many(const float *x, const float *w, int64_t count, int64_t width, int64_t neurons, float *panel,
                          float *gate, int64_t stride) {
  for (int64_t j = 0; j < neurons; j += PANEL) {
    transpose_panel(w, j, neurons, width, panel);
    each_tile(count, [&](int64_t n, auto together) {
      multiply_panel<together>(width, x + n * width, width, 1, panel, PANEL, gate + n * stride + j, stride);
    });
  }
}

}  // namespace
