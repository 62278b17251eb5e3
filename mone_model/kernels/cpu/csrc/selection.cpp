// The fused activation, selection and product with up.
#include "kernels.h"
#include "selection.h"

namespace mone {

template <class T>
void select_and_gate(int64_t rows, int64_t neurons, int64_t kept, int64_t activation, const T *gate, int64_t gate_stride,
                     const T *up, int64_t up_stride, const float *probs, T *hidden, uint16_t *masks, T *gates, T *ups,
                     float *threshold, int64_t threads) {
  const int64_t padded = rounded_up(neurons), words = words_of(neurons);
#pragma omp parallel num_threads(threads)
  {
    Aligned<float> active(padded);
    int32_t guess = FIRST_GUESS;
#pragma omp for
    for (int64_t n = 0; n < rows; n++) {
      const T *g = gate + n * gate_stride, *u = up + n * up_stride;
      T *to = hidden + n * neurons, *to_gates = gates + n * kept, *to_ups = ups + n * kept;
      uint16_t *mask = masks + n * words;
      // While the row is activated and selected, memory would idle: it fetches what will be written,
      activate(activation, g, neurons, active.data, [=](int64_t j) {
        __builtin_prefetch(to + j, 1, 2);
        if (j < kept) __builtin_prefetch(to_gates + j, 1, 2), __builtin_prefetch(to_ups + j, 1, 2);
      });
      guess = select(active.data, neurons, kept, guess, mask);
      std::memcpy(threshold + n, &guess, sizeof(float));
      each_vector(neurons, [=, prob = probs[n], from = active.data, left = kept](int64_t j, auto count) mutable {
        const unsigned bits = bits_at(mask, j);
        const Vector of_up = load_first(u + j, count);
        // and while that is written, the next row.
        if (j % WORD == 0) __builtin_prefetch(g + gate_stride + j, 0, 2), __builtin_prefetch(u + up_stride + j, 0, 2);
        store_first(to + j, only(load(from + j) * of_up * prob, bits), count);
        // Whole vectors would reach into the next row, which another thread writes.
        store_first(to_gates, compress(load_first(g + j, count), bits), left);
        store_first(to_ups, compress(of_up, bits), left);
        const int here = __builtin_popcount(bits);
        to_gates += here, to_ups += here, left -= here;
      });
    }
  }
}

template <class T>
void select_and_gate_backward(int64_t rows, int64_t neurons, int64_t kept, int64_t activation, const T *dhidden,
                              const uint16_t *masks, const T *gates, const T *ups, const float *probs, T *dgate, T *dup,
                              float *dprobs, int64_t threads) {
  // A part of a row at a time: reading, computing and writing whole rows would hardly overlap.
  constexpr int64_t PART = 256;
  const int64_t words = words_of(neurons);
#pragma omp parallel num_threads(threads)
  {
    Aligned<float> dh(PART + LANES), dg(PART + LANES), du(PART + LANES);
#pragma omp for
    for (int64_t n = 0; n < rows; n++) {
      const T *of_gates = gates + n * kept, *of_ups = ups + n * kept;
      float dprob = 0;
      for (int64_t first = 0; first < neurons; first += PART) {
        const int64_t size = std::min(PART, neurons - first), at = n * neurons + first;
        const uint16_t *mask = masks + n * words + first / WORD;
        const int64_t here = compress_row(dhidden + at, mask, size, dh.data);
        dprob += differentiate(activation, here, probs[n], dh.data, of_gates, of_ups, dg.data, du.data);
        of_gates += here, of_ups += here;
        each_vector(size, [=, from_gate = dg.data, from_up = du.data](int64_t j, auto count) mutable {
          const unsigned bits = bits_at(mask, j);
          store_first(dgate + at + j, expand(load(from_gate), bits), count);
          store_first(dup + at + j, expand(load(from_up), bits), count);
          from_gate += __builtin_popcount(bits), from_up += __builtin_popcount(bits);
        });
      }
      dprobs[n] = dprob;
    }
  }
}

template decltype(select_and_gate<float>) select_and_gate<float>;
template decltype(select_and_gate<BFloat16>) select_and_gate<BFloat16>;
template decltype(select_and_gate_backward<float>) select_and_gate_backward<float>;
template decltype(select_and_gate_backward<BFloat16>) select_and_gate_backward<BFloat16>;

}  // namespace mone
