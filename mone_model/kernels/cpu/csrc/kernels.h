// The kernels that operators.cpp registers; it checks their arguments. Plain C++, so that they compile without torch.
//
// Shapes: N rows sorted by expert, E experts, D width, H neurons, K kept, W = ceil(H / 16) words of a mask: bit j % 16 of
// word j / 16 is neuron j. activation: as in `dispatch`. T: float or BFloat16; all sums are fp32.
#pragma once

#include <cstdint>

namespace mone {

struct BFloat16 {
  uint16_t bits;
};

constexpr int64_t NUM_ACTIVATIONS = 5;

// hidden [N, H] = act(gate) * up * prob of the K neurons that each row keeps, zero elsewhere. For the backward pass: masks
// [N, W]; gates and ups [N, K] of the neurons kept, before the activation. threshold [N]: the smallest |act(gate)| kept.
template <class T>
void select_and_gate(int64_t rows, int64_t neurons, int64_t kept, int64_t activation, const T *gate, int64_t gate_stride,
                     const T *up, int64_t up_stride, const float *probs, T *hidden, uint16_t *masks, T *gates, T *ups,
                     float *threshold, int64_t threads);

template <class T>
void select_and_gate_backward(int64_t rows, int64_t neurons, int64_t kept, int64_t activation, const T *dhidden,
                              const uint16_t *masks, const T *gates, const T *ups, const float *probs, T *dgate, T *dup,
                              float *dprobs, int64_t threads);

// What the balance loss reads: sizes [E, H], the sums of the sizes of the neurons over every `stride`-th row of an expert, S
// rows in all. The forms are those of NEURON_BALANCE_FORMS in mone_model/config.py, counted from 1; 0: nothing.
struct Balance {
  int64_t form, stride;
  static constexpr int64_t NORMALISED = 1, UNMASKED = 2, MASKED = 3;
  // Whether neurons that are not kept have a gradient.
  bool is_dense() const { return form == NORMALISED || form == UNMASKED; }
  // Of so many rows.
  int64_t sampled(int64_t rows) const { return (rows + stride - 1) / stride; }
};

// out [N, D]; masks, gates, ups and threshold as above. offsets [E + 1]: first row of each expert, and N. gate_up
// [E, 2, H, D], down [E, H, D]. counts [E, 2, H] or null: in how many of an expert's rows each neuron was kept, and the sum
// of its |act(gate)|. sizes [E, H] if the balance has a form; all_gates [S, H], before their activation, if it is dense.
// bias [E, H] or null: not negative, added to |act(gate)| for the selection only; threshold is then the smallest sum kept.
void experts_forward(int64_t rows, int64_t experts, int64_t width, int64_t neurons, int64_t kept, const int64_t *offsets,
                     int64_t activation, Balance balance, const float *x, const float *gate_up, const float *down,
                     const float *probs, const float *bias, float *out, uint16_t *masks, float *gates, float *ups, float *threshold,
                     double *counts, float *all_gates, float *sizes, int64_t threads);

// Gradients of all inputs from those of out, dy, and of sizes, dsizes. add: add those of the weights to what is there.
// balance.form is 0 if sizes have no gradient.
void experts_backward(int64_t rows, int64_t experts, int64_t width, int64_t neurons, int64_t kept, const int64_t *offsets,
                      int64_t activation, Balance balance, const float *dy, const float *dsizes, const float *x,
                      const float *gate_up, const float *down, const float *probs, const uint16_t *masks,
                      const float *gates, const float *ups, const float *all_gates, float *dx, float *dprobs,
                      float *dgate_up, float *ddown, int64_t add, int64_t threads);

// The experts for a few rows, forward only. kept: K, or 0 to keep the neurons whose |act(gate)| reaches the threshold.
// rows_of_experts [E]. bias: as above.
template <class T>
void decode(int64_t rows, int64_t experts, int64_t width, int64_t neurons, int64_t kept, float threshold,
            const int64_t *rows_of_experts, int64_t activation, const T *x, const T *gate_up, const T *down,
            const float *probs, const float *bias, T *out, uint16_t *masks, int64_t threads);

// A tensor [positions, sequences, heads, width]: the numbers of a head lie side by side.
template <class T>
struct Heads {
  T *data;
  int64_t position_stride, sequence_stride, head_stride;
  T *row(int64_t position, int64_t sequence, int64_t head) const {
    return data + position * position_stride + sequence * sequence_stride + head * head_stride;
  }
};

// context = softmax(scale q k^T) v of each head, a query with the keys up to its own. q: [length, sequences, heads, width]; k
// and v the same, of groups of heads; context contiguous. For the backward pass: logsumexp [sequences, heads, length] of the
// scaled scores.
void attend(int64_t length, int64_t sequences, int64_t heads, int64_t groups, int64_t width, float scale,
            Heads<const float> q, Heads<const float> k, Heads<const float> v, float *context, float *logsumexp,
            int64_t threads);

// Gradients from that of the context; these and the context are contiguous.
void attend_backward(int64_t length, int64_t sequences, int64_t heads, int64_t groups, int64_t width, float scale,
                     Heads<const float> q, Heads<const float> k, Heads<const float> v, const float *context,
                     const float *logsumexp, const float *dcontext, float *dq, float *dk, float *dv, int64_t threads);

}  // namespace mone
