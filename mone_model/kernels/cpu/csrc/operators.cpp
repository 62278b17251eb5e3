// Registers the kernels as torch operators: checks the arguments and allocates the results.
//
// The schemas, the shapes without data and the gradients are in the Python modules. Only this file includes torch,
// and only the stable ABI, which compiles in about a second; torch/library.h takes five times as long.

// The oldest torch that pyproject.toml allows.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>

#include "kernels.h"

namespace {

using mone::BFloat16;
using torch::stable::Tensor;
using Shape = std::initializer_list<int64_t>;

constexpr int64_t WORD = 16;
constexpr int64_t MOST_NEURONS = 65536;  // the kernels list them as 16-bit numbers

int64_t words_of(int64_t neurons) { return (neurons + WORD - 1) / WORD; }

int64_t num_threads() {
  uint32_t threads;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return threads;
}

int32_t dtype_of(const Tensor &tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

template <class T>
int32_t dtype_of() {
  if constexpr (std::is_same_v<T, float>) return aoti_torch_dtype_float32();
  else if constexpr (std::is_same_v<T, double>) return aoti_torch_dtype_float64();
  else if constexpr (std::is_same_v<T, BFloat16>) return aoti_torch_dtype_bfloat16();
  else if constexpr (std::is_same_v<T, int64_t>) return aoti_torch_dtype_int64();
  else return aoti_torch_dtype_int16();  // for uint16, with which torch computes little
}

template <class T>
constexpr const char *name_of() {
  if constexpr (std::is_same_v<T, float>) return "float32";
  else if constexpr (std::is_same_v<T, BFloat16>) return "bfloat16";
  else if constexpr (std::is_same_v<T, int64_t>) return "int64";
  else return "int16";
}

template <class Sizes>
std::string listed(const Sizes &sizes) {
  std::ostringstream text;
  for (const int64_t size : sizes) text << (text.tellp() > 0 ? ", " : "") << size;
  return "[" + text.str() + "]";
}

// contiguous: else only the numbers of a row lie side by side.
template <class T>
void check(const Tensor &tensor, const char *name, Shape shape, bool contiguous = true) {
  const auto sizes = tensor.sizes();
  const bool as_needed = tensor.is_cpu() && dtype_of(tensor) == dtype_of<T>() &&
                         std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()) &&
                         (tensor.is_contiguous() || (!contiguous && tensor.stride(-1) == 1));
  STD_TORCH_CHECK(as_needed, name, " must be a ", name_of<T>(), " tensor of shape ", listed(shape), " on the CPU, ",
                  contiguous ? "contiguous" : "with contiguous rows", "; it is ",
                  torch::headeronly::toString(tensor.scalar_type()), " of shape ", listed(sizes), " and strides ",
                  listed(tensor.strides()), tensor.is_cpu() ? "" : " on another device");
}

template <class T>
const T *input(const Tensor &tensor, const char *name, Shape shape, bool contiguous = true) {
  check<T>(tensor, name, shape, contiguous);
  return static_cast<const T *>(tensor.const_data_ptr());
}

template <class T>
T *output(const Tensor &tensor, const char *name, Shape shape) {
  check<T>(tensor, name, shape);
  return static_cast<T *>(tensor.mutable_data_ptr());
}

template <class T>
Tensor empty(Shape shape) {
  int64_t strides[4], stride = 1;
  for (int64_t i = shape.size() - 1; i >= 0; stride *= shape.begin()[i--]) strides[i] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.begin(), strides, dtype_of<T>(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
T *data(const Tensor &tensor) {
  return static_cast<T *>(tensor.mutable_data_ptr());
}

void check_dims(const Tensor &tensor, const char *name, int64_t dims) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions; it has shape ", listed(tensor.sizes()));
}

void check_options(int64_t kept, int64_t neurons, int64_t activation) {
  STD_TORCH_CHECK(neurons <= MOST_NEURONS, neurons, " neurons are more than ", MOST_NEURONS);
  STD_TORCH_CHECK(1 <= kept && kept <= neurons, "k must be from 1 to the number of neurons, ", neurons, "; it is ", kept);
  STD_TORCH_CHECK(0 <= activation && activation < mone::NUM_ACTIVATIONS, "there is no activation number ", activation);
}

// f(a number of the type of the tensor).
template <class F>
auto for_dtype(const Tensor &tensor, const char *name, F f) {
  const int32_t dtype = dtype_of(tensor);
  STD_TORCH_CHECK(dtype == dtype_of<float>() || dtype == dtype_of<BFloat16>(), name, " must be float32 or bfloat16; it is ",
                  torch::headeronly::toString(tensor.scalar_type()));
  return dtype == dtype_of<float>() ? f(float{}) : f(BFloat16{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select_and_gate(const Tensor &gate, const Tensor &up, const Tensor &probs,
                                                                   int64_t k, int64_t activation) {
  check_dims(gate, "gate", 2);
  const int64_t rows = gate.size(0), neurons = gate.size(1);
  check_options(k, neurons, activation);
  return for_dtype(gate, "gate", [&](auto number) {
    using T = decltype(number);
    const T *of_gate = input<T>(gate, "gate", {rows, neurons}, false), *of_up = input<T>(up, "up", {rows, neurons}, false);
    const float *of_probs = input<float>(probs, "probs", {rows});
    const Tensor hidden = empty<T>({rows, neurons}), masks = empty<uint16_t>({rows, words_of(neurons)});
    const Tensor gates = empty<T>({rows, k}), ups = empty<T>({rows, k}), threshold = empty<float>({rows});
    mone::select_and_gate(rows, neurons, k, activation, of_gate, gate.stride(0), of_up, up.stride(0), of_probs,
                          data<T>(hidden), data<uint16_t>(masks), data<T>(gates), data<T>(ups), data<float>(threshold),
                          num_threads());
    return std::make_tuple(hidden, masks, gates, ups, threshold);
  });
}

std::tuple<Tensor, Tensor, Tensor> select_and_gate_backward(const Tensor &dhidden, const Tensor &masks, const Tensor &gates,
                                                            const Tensor &ups, const Tensor &probs, int64_t activation) {
  check_dims(dhidden, "dhidden", 2);
  check_dims(gates, "gates", 2);
  const int64_t rows = dhidden.size(0), neurons = dhidden.size(1), k = gates.size(1);
  check_options(k, neurons, activation);
  return for_dtype(dhidden, "dhidden", [&](auto number) {
    using T = decltype(number);
    const T *of_dhidden = input<T>(dhidden, "dhidden", {rows, neurons});
    const uint16_t *of_masks = input<uint16_t>(masks, "masks", {rows, words_of(neurons)});
    const T *of_gates = input<T>(gates, "gates", {rows, k}), *of_ups = input<T>(ups, "ups", {rows, k});
    const float *of_probs = input<float>(probs, "probs", {rows});
    const Tensor dgate = empty<T>({rows, neurons}), dup = empty<T>({rows, neurons}), dprobs = empty<float>({rows});
    mone::select_and_gate_backward(rows, neurons, k, activation, of_dhidden, of_masks, of_gates, of_ups, of_probs,
                                   data<T>(dgate), data<T>(dup), data<float>(dprobs), num_threads());
    return std::make_tuple(dgate, dup, dprobs);
  });
}

struct Sizes {
  int64_t rows, experts, width, neurons;
};

// Of x [N, D] and down [E, H, D].
Sizes sizes_of(const Tensor &x, const Tensor &down) {
  check_dims(x, "x", 2);
  check_dims(down, "down", 3);
  const int64_t width = x.size(1);
  STD_TORCH_CHECK(width % WORD == 0, "the width must be a multiple of ", WORD, "; x has shape ", listed(x.sizes()));
  return {x.size(0), down.size(0), width, down.size(1)};
}

const int64_t *offsets_of(const Tensor &offsets, const Sizes &of) {
  const int64_t *first = input<int64_t>(offsets, "offsets", {of.experts + 1}), *last = first + of.experts;
  STD_TORCH_CHECK(*first == 0 && *last == of.rows && std::is_sorted(first, last + 1), "offsets must rise from 0 to ", of.rows,
                  ", the number of rows");
  return first;
}

mone::Balance balance_of(int64_t form, int64_t stride) {
  STD_TORCH_CHECK(0 <= form && form <= mone::Balance::MASKED, "there is no form of the balance loss number ", form);
  STD_TORCH_CHECK(stride >= 1, "stride must be at least 1; it is ", stride);
  return {form, stride};
}

// Rows of the gates that a dense form saves.
int64_t sampled_rows(const mone::Balance &balance, const int64_t *offsets, int64_t num_experts) {
  int64_t rows = 0;
  for (int64_t e = 0; balance.is_dense() && e < num_experts; e++) rows += balance.sampled(offsets[e + 1] - offsets[e]);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts(
    const Tensor &x, const Tensor &gate_up, const Tensor &down, const Tensor &probs, const Tensor &offsets,
    std::optional<Tensor> bias, int64_t k, int64_t activation, bool counting, int64_t form, int64_t stride) {
  const Sizes of = sizes_of(x, down);
  const auto [rows, num_experts, width, neurons] = of;
  check_options(k, neurons, activation);
  const float *of_x = input<float>(x, "x", {rows, width});
  const float *of_gate_up = input<float>(gate_up, "gate_up", {num_experts, 2, neurons, width});
  const float *of_down = input<float>(down, "down", {num_experts, neurons, width});
  const float *of_probs = input<float>(probs, "probs", {rows});
  const float *of_bias = bias ? input<float>(*bias, "bias", {num_experts, neurons}) : nullptr;
  const int64_t *of_offsets = offsets_of(offsets, of);
  const Tensor out = empty<float>({rows, width}), masks = empty<uint16_t>({rows, words_of(neurons)});
  const Tensor gates = empty<float>({rows, k}), ups = empty<float>({rows, k}), threshold = empty<float>({rows});
  const mone::Balance balance = balance_of(form, stride);
  const Tensor counts = empty<double>({num_experts, 2, neurons}), sizes = empty<float>({num_experts, neurons});
  const Tensor all_gates = empty<float>({sampled_rows(balance, of_offsets, num_experts), neurons});
  if (!form) std::fill_n(data<float>(sizes), num_experts * neurons, 0.0f);
  if (!counting) std::fill_n(data<double>(counts), num_experts * 2 * neurons, 0.0);
  mone::experts_forward(rows, num_experts, width, neurons, k, of_offsets, activation, balance, of_x, of_gate_up, of_down,
                        of_probs, of_bias, data<float>(out), data<uint16_t>(masks), data<float>(gates), data<float>(ups),
                        data<float>(threshold), counting ? data<double>(counts) : nullptr, data<float>(all_gates),
                        data<float>(sizes), num_threads());
  return {out, masks, gates, ups, counts, threshold, all_gates, sizes};
}

std::tuple<Tensor, Tensor> experts_backward(const Tensor &dgate_up, const Tensor &ddown, bool add, const Tensor &dy,
                                            const Tensor &x, const Tensor &gate_up, const Tensor &down, const Tensor &probs,
                                            const Tensor &offsets, const Tensor &masks, const Tensor &gates,
                                            const Tensor &ups, const Tensor &all_gates, std::optional<Tensor> dsizes,
                                            int64_t activation, int64_t form, int64_t stride) {
  const Sizes of = sizes_of(x, down);
  const auto [rows, num_experts, width, neurons] = of;
  check_dims(gates, "gates", 2);
  const int64_t k = gates.size(1);
  check_options(k, neurons, activation);
  const float *of_dy = input<float>(dy, "dy", {rows, width}), *of_x = input<float>(x, "x", {rows, width});
  const float *of_gate_up = input<float>(gate_up, "gate_up", {num_experts, 2, neurons, width});
  const float *of_down = input<float>(down, "down", {num_experts, neurons, width});
  const float *of_probs = input<float>(probs, "probs", {rows});
  const int64_t *of_offsets = offsets_of(offsets, of);
  const uint16_t *of_masks = input<uint16_t>(masks, "masks", {rows, words_of(neurons)});
  const float *of_gates = input<float>(gates, "gates", {rows, k}), *of_ups = input<float>(ups, "ups", {rows, k});
  float *to_gate_up = output<float>(dgate_up, "dgate_up", {num_experts, 2, neurons, width});
  float *to_down = output<float>(ddown, "ddown", {num_experts, neurons, width});
  const Tensor dx = empty<float>({rows, width}), dprobs = empty<float>({rows});
  const mone::Balance balance = balance_of(dsizes ? form : 0, stride);
  const float *of_dsizes = dsizes ? input<float>(*dsizes, "dsizes", {num_experts, neurons}) : nullptr;
  const float *of_all_gates = nullptr;
  if (balance.is_dense())
    of_all_gates = input<float>(all_gates, "all_gates", {sampled_rows(balance, of_offsets, num_experts), neurons});
  mone::experts_backward(rows, num_experts, width, neurons, k, of_offsets, activation, balance, of_dy, of_dsizes, of_x,
                         of_gate_up, of_down, of_probs, of_masks, of_gates, of_ups, of_all_gates, data<float>(dx),
                         data<float>(dprobs), to_gate_up, to_down, add, num_threads());
  return {dx, dprobs};
}

std::tuple<Tensor, Tensor> decode(const Tensor &x, const Tensor &gate_up, const Tensor &down, const Tensor &probs,
                                  const Tensor &tokens, std::optional<Tensor> bias, int64_t k, std::optional<double> threshold,
                                  int64_t activation) {
  const Sizes of = sizes_of(x, down);
  const int64_t rows = of.rows, num_experts = of.experts, width = of.width, neurons = of.neurons;
  const float *of_bias = bias ? input<float>(*bias, "bias", {num_experts, neurons}) : nullptr;
  check_options(threshold ? 1 : k, neurons, activation);
  const int64_t *rows_of_experts = input<int64_t>(tokens, "tokens", {num_experts});
  int64_t sum = 0;
  for (int64_t e = 0; e < num_experts && sum <= rows; e++) sum = rows_of_experts[e] < 0 ? rows + 1 : sum + rows_of_experts[e];
  STD_TORCH_CHECK(sum == rows, "tokens must add up to ", rows, ", the number of rows, and none be negative");
  return for_dtype(x, "x", [&](auto number) {
    using T = decltype(number);
    const T *of_x = input<T>(x, "x", {rows, width});
    const T *of_gate_up = input<T>(gate_up, "gate_up", {num_experts, 2, neurons, width});
    const T *of_down = input<T>(down, "down", {num_experts, neurons, width});
    const float *of_probs = input<float>(probs, "probs", {rows});
    const Tensor out = empty<T>({rows, width}), masks = empty<uint16_t>({rows, words_of(neurons)});
    mone::decode(rows, num_experts, width, neurons, threshold ? 0 : k, float(threshold.value_or(0)), rows_of_experts,
                 activation, of_x, of_gate_up, of_down, of_probs, of_bias, data<T>(out), data<uint16_t>(masks),
                 num_threads());
    return std::make_tuple(out, masks);
  });
}

struct Attention {
  int64_t length, sequences, heads, groups, width;
  float scale;
  mone::Heads<const float> q, k, v;
};

mone::Heads<const float> heads_of(const Tensor &tensor, const char *name, Shape shape) {
  return {input<float>(tensor, name, shape, false), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Attention attention_of(const Tensor &q, const Tensor &k, const Tensor &v) {
  check_dims(q, "q", 4);
  check_dims(k, "k", 4);
  const int64_t length = q.size(0), sequences = q.size(1), heads = q.size(2), groups = k.size(2), width = q.size(3);
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "the ", heads, " heads of q must be a multiple of the ", groups, " of k");
  return {length, sequences, heads, groups, width, float(std::pow(double(width), -0.5)),
          heads_of(q, "q", {length, sequences, heads, width}), heads_of(k, "k", {length, sequences, groups, width}),
          heads_of(v, "v", {length, sequences, groups, width})};
}

std::tuple<Tensor, Tensor> attend(const Tensor &q, const Tensor &k, const Tensor &v) {
  const Attention of = attention_of(q, k, v);
  const Tensor context = empty<float>({of.length, of.sequences, of.heads, of.width});
  const Tensor logsumexp = empty<float>({of.sequences, of.heads, of.length});
  mone::attend(of.length, of.sequences, of.heads, of.groups, of.width, of.scale, of.q, of.k, of.v, data<float>(context),
               data<float>(logsumexp), num_threads());
  return {context, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor &dcontext, const Tensor &q, const Tensor &k, const Tensor &v,
                                                   const Tensor &context, const Tensor &logsumexp) {
  const Attention of = attention_of(q, k, v);
  const Shape shape = {of.length, of.sequences, of.heads, of.width}, of_groups = {of.length, of.sequences, of.groups, of.width};
  const float *of_dcontext = input<float>(dcontext, "dcontext", shape), *of_context = input<float>(context, "context", shape);
  const float *of_logsumexp = input<float>(logsumexp, "logsumexp", {of.sequences, of.heads, of.length});
  const Tensor dq = empty<float>(shape), dk = empty<float>(of_groups), dv = empty<float>(of_groups);
  mone::attend_backward(of.length, of.sequences, of.heads, of.groups, of.width, of.scale, of.q, of.k, of.v, of_context,
                        of_logsumexp, of_dcontext, data<float>(dq), data<float>(dk), data<float>(dv), num_threads());
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mone, CPU, m) {
  m.impl("select_and_gate_cpu", TORCH_BOX(&select_and_gate));
  m.impl("select_and_gate_backward_cpu", TORCH_BOX(&select_and_gate_backward));
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("experts_backward", TORCH_BOX(&experts_backward));
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("attend_backward", TORCH_BOX(&attend_backward));
}
