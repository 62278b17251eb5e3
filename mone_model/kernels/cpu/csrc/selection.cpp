// The fused activation, selection and product with up, for kernels/cpu.py.
#include "selection.h"

extern "C" {

// act(gate) * up * prob of the K neurons kept, zero elsewhere: [N, H]; and what the backward pass needs of them, [N, K].
#define SELECT_AND_GATE(name, T)                                                                                          \
  void select_and_gate_##name(int64_t rows, int64_t neurons, int64_t kept, int64_t activation, const T *gate,             \
                              int64_t gate_stride, const T *up, int64_t up_stride, const float *probs, T *hidden,         \
                              uint16_t *masks, T *gates, T *ups, float *threshold, int64_t threads) {                     \
    select_and_gate(rows, neurons, kept, activation, gate, gate_stride, up, up_stride, probs, hidden, masks, gates, ups,  \
                    threshold, threads);                                                                                  \
  }                                                                                                                       \
  void select_and_gate_backward_##name(int64_t rows, int64_t neurons, int64_t kept, int64_t activation, const T *dhidden, \
                                       const uint16_t *masks, const T *gates, const T *ups, const float *probs, T *dgate, \
                                       T *dup, float *dprobs, int64_t threads) {                                          \
    select_and_gate_backward(rows, neurons, kept, activation, dhidden, masks, gates, ups, probs, dgate, dup, dprobs,      \
                             threads);                                                                                    \
  }
SELECT_AND_GATE(fp32, float)
SELECT_AND_GATE(bf16, BFloat16)

}  // extern "C"
