// SwiGLU, for kernels/cpu_swiglu.py. All fp32 and contiguous; a row holds all gates, then all ups.
#include "vectors.h"

extern "C" {

// y = silu(gate) * up. gate_up: [rows, 2 neurons], y: [rows, neurons].
void swiglu(int64_t rows, int64_t neurons, const float *gate_up, float *y, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * neurons > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    const float *gate = gate_up + n * 2 * neurons, *up = gate + neurons;
    each_vector(neurons, [=](int64_t j, auto count) {
      store_first(y + n * neurons + j, SiLU::value(load_first(gate + j, count)) * load_first(up + j, count), count);
    });
  }
}

// Gradients of gates and ups from that of y.
void swiglu_backward(int64_t rows, int64_t neurons, const float *dy, const float *gate_up, float *dgate_up, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * neurons > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    const float *gate = gate_up + n * 2 * neurons, *up = gate + neurons;
    float *dgate = dgate_up + n * 2 * neurons, *dup = dgate + neurons;
    each_vector(neurons, [=](int64_t j, auto count) {
      const Vector x = load_first(gate + j, count), d = load_first(dy + n * neurons + j, count);
      store_first(dgate + j, d * load_first(up + j, count) * SiLU::slope(x), count);
      store_first(dup + j, d * SiLU::value(x), count);
    });
  }
}

}  // extern "C"
