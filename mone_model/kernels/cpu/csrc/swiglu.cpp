// SwiGLU, for kernels/cpu_swiglu.py. All contiguous; a row holds all gates, then all ups.
#include "vectors.h"

namespace {

template <class T>
void swiglu(int64_t rows, int64_t neurons, const T *gate_up, T *y, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * neurons > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    const T *gate = gate_up + n * 2 * neurons, *up = gate + neurons;
    each_vector(neurons, [=](int64_t j, auto count) {
      store_first(y + n * neurons + j, SiLU::value(load_first(gate + j, count)) * load_first(up + j, count), count);
    });
  }
}

template <class T>
void swiglu_backward(int64_t rows, int64_t neurons, const T *dy, const T *gate_up, T *dgate_up, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * neurons > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    const T *gate = gate_up + n * 2 * neurons, *up = gate + neurons;
    T *dgate = dgate_up + n * 2 * neurons, *dup = dgate + neurons;
    each_vector(neurons, [=](int64_t j, auto count) {
      const Vector x = load_first(gate + j, count), d = load_first(dy + n * neurons + j, count);
      store_first(dgate + j, d * load_first(up + j, count) * SiLU::slope(x), count);
      store_first(dup + j, d * SiLU::value(x), count);
    });
  }
}

}  // namespace

extern "C" {

// y = silu(gate) * up, gate_up: [rows, 2 neurons], y: [rows, neurons]; and gradients of gates and ups from that of y.
#define SWIGLU(name, T)                                                                                               \
  void swiglu_##name(int64_t rows, int64_t neurons, const T *gate_up, T *y, int64_t threads) {                        \
    swiglu(rows, neurons, gate_up, y, threads);                                                                       \
  }                                                                                                                   \
  void swiglu_backward_##name(int64_t rows, int64_t neurons, const T *dy, const T *gate_up, T *dgate_up,              \
                              int64_t threads) {                                                                      \
    swiglu_backward(rows, neurons, dy, gate_up, dgate_up, threads);                                                   \
  }
SWIGLU(fp32, float)
SWIGLU(bf16, BFloat16)

}  // extern "C"
