"""GPU kernels: activation, selection and product with up fused into one pass over each row, and the gradients.

    if selection.selects(gate_NH):                             # needs the triton package
        hidden, masks, gates, ups, threshold = selection.select_and_gate(gate_NH, up_NH, probs_N, k, "silu")
        dgate, dup, dprobs = selection.select_and_gate_backward(dhidden, masks, gates, ups, probs_N, "silu")

These kernels have not run on a GPU yet. Their numerics are tested in Triton's interpreter (TRITON_INTERPRET=1), and they
compile for sm_80, sm_90 and sm_100 with their rows in registers (python -m benchmarks.triton_resources).

Each program computes one row. It holds the bits of all magnitudes in registers, padded to BLOCK (a power of two), searches
for the K-th largest and writes the mask. Then it reads the row again, CHUNK neurons at a time, and writes the rest.
Selection is exact for the fp32 magnitudes that the kernel computes. Their last bit may differ from torch's, and with it the
choice between neurons that differ only in that bit.

Shapes: N rows (a token in one of its experts), H neurons, K kept, W = ceil(H / 16) words of a mask: bit j % 16 of word
j // 16 is neuron j. The reference is `mone_model.neuron_selection.select_and_gate_reference`.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

MAX_NEURONS = 16384  # two counts share 32 bits, and more would not stay in registers
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)  # the bits of infinity; those of NaN are larger


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) in fp32."""
    # The limit at -inf is 0; the formula would give NaN.
    if ACTIVATION == "silu":
        return tl.where(x < LOWEST, 0.0, x / (1 + tl.exp(-x)))
    elif ACTIVATION == "gelu":
        return tl.where(x < LOWEST, 0.0, 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)))
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "sigmoid":
        return 1 / (1 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "relu_squared")
        return tl.where(x <= 0, 0.0, x * x)


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    # Clamped where the function has reached its limit, so that infinity is not multiplied by 0. NaN stays NaN.
    if ACTIVATION == "silu":
        x = tl.where(x > 128, 128.0, tl.where(x < -128, -128.0, x))
        sigmoid = 1 / (1 + tl.exp(-x))
        return sigmoid * (1 + x * (1 - sigmoid))
    elif ACTIVATION == "gelu":
        x = tl.where(x > 64, 64.0, tl.where(x < -64, -64.0, x))
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "sigmoid":
        sigmoid = 1 / (1 + tl.exp(-x))
        return sigmoid * (1 - sigmoid)
    else:
        tl.static_assert(ACTIVATION == "relu_squared")
        return tl.where(x <= 0, 0.0, 2 * x)


@triton.jit
def _kth_largest(bits, guess, k, neurons, GRAIN: tl.constexpr):
    # bits: of `neurons` magnitudes, -1 elsewhere. Invariant: the result is in [low, top], and at_low >= k are at least low.
    low = 0
    top = 0x7FFFFFFF
    at_low = neurons
    # Bits are logarithmic: 1 << 23 is a factor of two. Search that far on both sides of the guess, then farther.
    reach = 1 << 23
    guess = tl.minimum(tl.maximum(guess, reach + 1), 0x7FFFFFFF - reach)
    first = guess - reach
    second = guess + reach
    while (at_low != k) & (low != top):
        # The reduction is the cost of a pass, so one reduction counts for two bounds: first <= second.
        counts = tl.sum(tl.where(bits >= second, 0x10001, (bits >= first).to(tl.int32)))
        at_first = counts & 0xFFFF
        at_second = counts >> 16
        top = tl.where(at_second >= k, top, tl.where(at_first >= k, second - 1, first - 1))
        low = tl.where(at_second >= k, second, tl.where(at_first >= k, first, low))
        at_low = tl.where(at_second >= k, at_second, tl.where(at_first >= k, at_first, at_low))

        width = top - low
        reach = tl.minimum(reach * 4, 1 << 28)
        third = tl.maximum(width // 3, 1)
        step = tl.where(top == 0x7FFFFFFF, tl.minimum(reach, third), third)
        # Half of the neurons of a ReLU are 0: try 0 before all exponents of small numbers.
        first = tl.where(low == 0, 1, low + step)
        second = tl.where(low == 0, top + 1 - tl.minimum(reach, width), low + tl.minimum(2 * step, width))
        if GRAIN > 0:  # noqa: SIM102 - decided when it is compiled
            # With ties at_low may never be k. Among few distinct magnitudes, step from one to the next.
            if (width < GRAIN) & (at_low != k):
                low = tl.min(tl.where(bits >= low, bits, 0x7FFFFFFF))
                first = low + 1
                second = first + (top - low) // 2
    return tl.min(tl.where(bits >= low, bits, 0x7FFFFFFF))


@triton.jit
def unpack(masks_ptr, start, neurons, CHUNK: tl.constexpr):
    """[CHUNK] int32 for the neurons of a row's mask from `start` on: 1 if kept."""
    words = start // 16 + tl.arange(0, CHUNK // 16)
    masks = tl.load(masks_ptr + words, mask=words < (neurons + 15) // 16, other=0).to(tl.int32)
    return tl.reshape((masks[:, None] >> tl.arange(0, 16)[None, :]) & 1, (CHUNK,))


@triton.jit
def magnitudes(gate_ptr, neurons, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] int32 bits of |act(gate)| of a row, and act(gate); bits are -1 behind the last neuron."""
    neuron = tl.arange(0, BLOCK)
    active = activate(tl.load(gate_ptr + neuron, mask=neuron < neurons, other=0).to(tl.float32), ACTIVATION)
    # Without the sign, bits have the order of their floats. NaN counts as infinity.
    bits = tl.where(neuron < neurons, tl.minimum(active.to(tl.int32, bitcast=True) & 0x7FFFFFFF, INFINITE), -1)
    return bits, active


@triton.jit
def store_mask(kept, masks_ptr, neurons, BLOCK: tl.constexpr):
    """Write the words of a row's mask. kept: [BLOCK] bool. `unpack` may read them afterwards."""
    words = tl.arange(0, BLOCK // 16)
    masks = tl.sum(tl.reshape(kept.to(tl.int32), (BLOCK // 16, 16)) << tl.arange(0, 16)[None, :], axis=1)
    tl.store(masks_ptr + words, masks.to(tl.int16), mask=words < (neurons + 15) // 16)
    tl.debug_barrier()  # other threads read them


@triton.jit
def mark_best(gate_ptr, masks_ptr, neurons, k, ACTIVATION: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr):
    """Write the mask of the k neurons of a row with the largest |act(gate)|; returns the bits of the k-th largest."""
    bits, active = magnitudes(gate_ptr, neurons, ACTIVATION, BLOCK)
    mean = tl.sum(tl.where(bits >= 0, tl.abs(active), 0)) / neurons
    threshold = _kth_largest(bits, mean.to(tl.int32, bitcast=True) & 0x7FFFFFFF, k, neurons, GRAIN)
    above = bits > threshold
    equal = bits == threshold
    wanted = k - tl.sum(above.to(tl.int32))
    store_mask(above | (equal & (tl.cumsum(equal.to(tl.int32)) <= wanted)), masks_ptr, neurons, BLOCK)
    return threshold


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    probs_ptr,
    hidden_ptr,
    masks_ptr,
    gates_ptr,
    ups_ptr,
    threshold_ptr,
    gate_stride,
    up_stride,
    neurons,
    k,
    ACTIVATION: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write hidden [H], the mask [W], the K kept gates and ups, and the threshold of one row."""
    # int64: rows times neurons may exceed 2^31.
    row = tl.program_id(0).to(tl.int64)
    gate_ptr += row * gate_stride
    up_ptr += row * up_stride
    hidden_ptr += row * neurons
    masks_ptr += row * ((neurons + 15) // 16)
    gates_ptr += row * k
    ups_ptr += row * k
    prob = tl.load(probs_ptr + row).to(tl.float32)

    threshold = mark_best(gate_ptr, masks_ptr, neurons, k, ACTIVATION, GRAIN, BLOCK)
    tl.store(threshold_ptr + row, threshold.to(tl.float32, bitcast=True))

    # One chunk at a time: a long row at once would spill registers.
    before = 0
    for start in range(0, neurons, CHUNK):
        chosen = unpack(masks_ptr, start, neurons, CHUNK)
        position = before + tl.cumsum(chosen) - 1
        before += tl.sum(chosen)
        here = start + tl.arange(0, CHUNK)
        gate = tl.load(gate_ptr + here, mask=here < neurons, other=0)
        up = tl.load(up_ptr + here, mask=here < neurons, other=0)
        tl.store(gates_ptr + position, gate, mask=chosen > 0)
        tl.store(ups_ptr + position, up, mask=chosen > 0)
        hidden = activate(gate.to(tl.float32), ACTIVATION) * up.to(tl.float32) * prob
        hidden = tl.where(chosen > 0, hidden, 0)
        tl.store(hidden_ptr + here, hidden.to(hidden_ptr.dtype.element_ty), mask=here < neurons)


@triton.jit
def backward_kernel(
    dhidden_ptr,
    masks_ptr,
    gates_ptr,
    ups_ptr,
    probs_ptr,
    dgate_ptr,
    dup_ptr,
    dprobs_ptr,
    dhidden_stride,
    neurons,
    k,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the gradients of gate [H], up [H] and the probability of one row; 0 at neurons that were dropped."""
    row = tl.program_id(0).to(tl.int64)
    dhidden_ptr += row * dhidden_stride
    masks_ptr += row * ((neurons + 15) // 16)
    gates_ptr += row * k
    ups_ptr += row * k
    dgate_ptr += row * neurons
    dup_ptr += row * neurons
    prob = tl.load(probs_ptr + row).to(tl.float32)

    before = 0
    dprob = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, neurons, CHUNK):
        chosen = unpack(masks_ptr, start, neurons, CHUNK)
        position = before + tl.cumsum(chosen) - 1
        before += tl.sum(chosen)
        here = start + tl.arange(0, CHUNK)
        dhidden = tl.load(dhidden_ptr + here, mask=chosen > 0, other=0).to(tl.float32)
        gate = tl.load(gates_ptr + position, mask=chosen > 0, other=0).to(tl.float32)
        up = tl.load(ups_ptr + position, mask=chosen > 0, other=0).to(tl.float32)
        active = activate(gate, ACTIVATION)
        # The mask is needed although dropped values are loaded as 0: 0 times NaN or infinity is NaN.
        dgate = tl.where(chosen > 0, dhidden * up * prob * _slope(gate, ACTIVATION), 0)
        dup = tl.where(chosen > 0, dhidden * active * prob, 0)
        tl.store(dgate_ptr + here, dgate.to(dgate_ptr.dtype.element_ty), mask=here < neurons)
        tl.store(dup_ptr + here, dup.to(dup_ptr.dtype.element_ty), mask=here < neurons)
        dprob += dhidden * active * up
    tl.store(dprobs_ptr + row, tl.sum(dprob).to(dprobs_ptr.dtype.element_ty))


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
# Distance in fp32 steps between neighbours in a 16-bit type: within it there are few distinct magnitudes.
GRAIN = {torch.float32: 0, torch.bfloat16: 1 << 16, torch.float16: 1 << 13}


def block_size(neurons: int) -> int:
    """BLOCK: a power of two that holds a row."""
    return max(128, triton.next_power_of_2(neurons))


def launch_options(neurons: int) -> list[dict[str, int]]:
    """CHUNK and num_warps to try for rows of this many neurons.

    A thread has 8 to 32 magnitudes of the row, and 4 neurons of a chunk: 16 bytes of fp32, 8 of 16 bits. With more than 16
    warps it could have no more than 64 registers, which are too few.
    """
    fitting = [warps for warps in (1, 2, 4, 8, 16) if 8 <= block_size(neurons) // (32 * warps) <= 32]
    return [{"CHUNK": 128 * warps, "num_warps": warps} for warps in fitting or [1]]


@functools.cache
def _tuned(kernel: Any, block: int) -> Any:
    """The kernel with the fastest launch for rows of this size and each dtype, measured at its first use."""
    configs = [triton.Config({"CHUNK": options["CHUNK"]}, options["num_warps"]) for options in launch_options(block)]
    return triton.autotune(configs, key=[])(kernel)


def _launch(kernel: Any, shape: torch.Size, *arguments: Any, **constants: Any) -> None:
    rows, neurons = shape
    if rows == 0:
        return
    if INTERPRETED:
        kernel[(rows,)](*arguments, CHUNK=128, **constants)
    else:
        with torch.cuda.device_of(arguments[0]):
            _tuned(kernel, block_size(neurons))[(rows,)](*arguments, **constants)


def select_and_gate(
    gate: torch.Tensor, up: torch.Tensor, probs: torch.Tensor, k: int, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mone::select_and_gate` (mone_model.neuron_selection) for tensors that `selects` accepts.

    gate, up: [N, H] in one dtype, before the activation; rows may lie apart, as the halves of one [N, 2 H] tensor do.
    probs: [N]. k: 1 <= k <= H, which the caller has checked.

    Returns hidden [N, H]; masks [N, W] int16; gates and ups [N, k], those of the neurons kept in ascending order; threshold
    [N] fp32, the k-th largest |act(gate)|. All but masks and threshold are in the dtype of gate. Exactly k are kept whatever
    a row holds; NaN ranks as infinity.
    """
    gate, up, probs = _rows(gate), _rows(up), probs.contiguous()
    rows, neurons = gate.shape
    hidden = gate.new_empty(rows, neurons)
    masks = gate.new_empty(rows, -(-neurons // 16), dtype=torch.int16)
    gates, ups, threshold = gate.new_empty(rows, k), gate.new_empty(rows, k), gate.new_empty(rows, dtype=torch.float32)
    _launch(
        forward_kernel, gate.shape, gate, up, probs, hidden, masks, gates, ups, threshold,
        gate.stride(0), up.stride(0), neurons, k, ACTIVATION=activation, GRAIN=GRAIN[gate.dtype], BLOCK=block_size(neurons),
    )  # fmt: skip
    return hidden, masks, gates, ups, threshold


def select_and_gate_backward(
    dhidden: torch.Tensor, masks: torch.Tensor, gates: torch.Tensor, ups: torch.Tensor, probs: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, [N, H] in the dtype of dhidden and zero where dropped, and of probs, in its own dtype.

    dhidden: [N, H]. masks [N, W], gates and ups [N, k]: contiguous, as `select_and_gate` returned them. probs: [N].
    """
    dhidden, probs = _rows(dhidden), probs.contiguous()
    rows, neurons = dhidden.shape
    dgate, dup, dprobs = dhidden.new_empty(rows, neurons), dhidden.new_empty(rows, neurons), torch.empty_like(probs)
    _launch(
        backward_kernel, dhidden.shape, dhidden, masks, gates, ups, probs, dgate, dup, dprobs,
        dhidden.stride(0), neurons, gates.size(1), ACTIVATION=activation,
    )  # fmt: skip
    return dgate, dup, dprobs


def selects(gate: torch.Tensor) -> bool:
    """Whether `select_and_gate` can be used for this tensor, [N, H]: on a GPU, or anywhere in Triton's interpreter."""
    return gate.dtype in GRAIN and gate.size(1) <= MAX_NEURONS and (gate.is_cuda or INTERPRETED)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
