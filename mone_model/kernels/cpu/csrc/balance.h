// The sizes of the neurons of a row, of which the balance loss is made (mone_model/neuron_balance.py), and their gradient.
#pragma once

#include "selection.h"

namespace {

using mone::Balance;

// What all sizes of a row are multiplied by. active: filled up with zeros.
inline float scale_of(Balance balance, const float *active, int padded) {
  if (balance.form != Balance::NORMALISED) return 1;
  Vector sum{};
  for (int j = 0; j < padded; j += LANES) sum += magnitude(load(active + j));
  return 1 / std::max(total(sum), std::numeric_limits<float>::min());
}

// sizes += those of a row.
inline void add_sizes(Balance balance, const float *active, const uint16_t *mask, int padded, float *sizes) {
  const float scale = scale_of(balance, active, padded);
  for (int j = 0; j < padded; j += LANES) {
    const Vector size = magnitude(load(active + j)) * scale;
    store(sizes + j, load(sizes + j) + (balance.form == Balance::MASKED ? only(size, bits_at(mask, j)) : size));
  }
}

// The gradient of magnitude(value) times that of the value, `slope`: zero where the value is.
inline Vector slope_of_magnitude(Vector value, Vector slope) {
  return zero_where(value == Vector{}, choose(value < Vector{}, -slope, slope));
}

// dgate = the gradient of sum_j dsizes[j] size[j] for a row and a dense form. active: room for a row, filled up to a word.
inline void differentiate_sizes(Balance balance, int activation, const float *gate, int neurons, const float *dsizes,
                                float *active, float *dgate) {
  activate(activation, gate, neurons, active);
  const float scale = scale_of(balance, active, rounded_up(neurons));
  float mean = 0;
  if (balance.form == Balance::NORMALISED) {
    Vector sum{};
    each_vector(neurons, [&](int64_t j, auto count) {
      sum += magnitude(load_first(active + j, count)) * load_first(dsizes + j, count);
    });
    mean = total(sum) * scale;
  }
  dispatch(activation, [&](auto function) {
    each_vector(neurons, [=](int64_t j, auto count) {
      const Vector slope = function.slope(load_first(gate + j, count));
      const Vector of_size = (load_first(dsizes + j, count) - mean) * scale;
      store_first(dgate + j, slope_of_magnitude(load_first(active + j, count), of_size * slope), count);
    });
  });
}

// dgates += the same for the neurons that a row keeps, in the masked form. list: their indices.
inline void add_masked_slopes(int activation, int64_t kept, const float *gates, const uint16_t *list, const float *dsizes,
                              float *dgates) {
  dispatch(activation, [=](auto function) {
    each_vector(kept, [=](int64_t p, auto count) {
      Vector of_size{};
      for (int i = 0; i < std::min<int64_t>(count, LANES); i++) of_size[i] = dsizes[list[p + i]];
      const Vector gate = load_first(gates + p, count);
      const Vector slope = slope_of_magnitude(function.value(gate), of_size * function.slope(gate));
      store_first(dgates + p, load_first(dgates + p, count) + slope, count);
    });
  });
}

}  // namespace
