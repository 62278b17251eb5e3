"""The operators and backends that stand on the kernels: dispatch, autograd, torch.compile, many elements, experts."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.checks import DTYPES, Errors, Inputs, Shape, make_inputs, recorded
from benchmarks.gpu.isolation import Record
from mone_model import expert_backends, neuron_selection
from mone_model.activations import ACTIVATIONS
from mone_model.expert_backends import BACKENDS, Request, expert_gemm
from mone_model.neuron_selection import TopK, select_and_gate, unpack


def use_interpreted_kernels() -> None:
    """Where Triton interprets, let its kernels serve tensors on the CPU, for the life of this process."""
    from mone_model.kernels.triton import decode, selection

    if selection.INTERPRETED:
        neuron_selection._kernels_for = lambda tensor: selection
        expert_backends._decode_kernel_for = lambda tensor: decode.decode


def check_operators(device: str, compiler: str) -> Iterator[Record]:
    """compiler: backend of torch.compile."""
    from mone_model.kernels.triton import selection

    use_interpreted_kernels()
    k = 24
    names, gate_NH, up_NH, probs_N, dhidden_NH = make_inputs(Shape(96, (k,), halves=True), torch.float32, 1, device)
    plain = slice(len(names) - 4, None)  # rows without NaN
    inputs = Inputs(names[plain], *(tensor[plain] for tensor in (gate_NH, up_NH, probs_N, dhidden_NH)))

    yield recorded("operator and autograd", lambda: compare_operator(selection, inputs, k, select_and_gate))
    compiled = torch.compile(select_and_gate, backend=compiler, fullgraph=True)
    yield recorded("operator under torch.compile", lambda: compare_operator(selection, inputs, k, compiled))
    yield recorded("torch.library.opcheck", lambda: _opcheck(inputs, k))
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if free > 2**35:
            yield recorded("more than 2^31 elements", lambda: compare_many_elements(selection, 2**31 // 16384 + 3))
        else:
            yield {
                "kind": "skipped",
                "name": "more than 2^31 elements",
                "reason": f"needs 32 GiB, {free / 2**30:.0f} are free",
            }


def compare_operator(kernels: Any, inputs: Inputs, k: int, operator: Callable[..., Any]) -> Errors:
    """The operator must give what the kernels give, bit for bit, and their gradients through autograd."""
    names, gate_NH, up_NH, probs_N, dhidden_NH = inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (gate_NH, up_NH, probs_N)]
    gated = operator(*leaves, k, "silu")
    gradients = torch.autograd.grad(gated.hidden_NH, leaves, dhidden_NH)
    hidden_NH, masks_NW, gates_NK, ups_NK, threshold_N = kernels.select_and_gate(gate_NH, up_NH, probs_N, k, "silu")
    right = kernels.select_and_gate_backward(dhidden_NH, masks_NW, gates_NK, ups_NK, probs_N, "silu")
    errors = Errors(names)
    for name, ours, theirs in (
        ("hidden", gated.hidden_NH.detach(), hidden_NH),
        ("masks", gated.masks_NW, masks_NW),
        ("threshold", gated.threshold_N[:, None], threshold_N[:, None]),
        ("dgate", gradients[0], right[0]),
        ("dup", gradients[1], right[1]),
        ("dprobs", gradients[2][:, None], right[2][:, None]),
    ):
        errors.require(name, ours == theirs)
    return errors


def _opcheck(inputs: Inputs, k: int) -> Errors:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (inputs.gate_NH, inputs.up_NH, inputs.probs_N)]
    torch.library.opcheck(torch.ops.mone.select_and_gate.default, (*leaves, k, "silu"))  # raises what is wrong
    errors = Errors(inputs.names)
    errors.require("opcheck", torch.ones(1, 1, dtype=torch.bool))
    return errors


def compare_many_elements(kernels: Any, rows: int, neurons: int = 16384, k: int = 64) -> Errors:
    """The last of equal rows must be as the first, where an element's number does not fit in 32 bits."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    gate_1H, up_1H = torch.randn(2, 1, neurons, generator=generator, device="cuda", dtype=torch.bfloat16)
    gate_NH, up_NH, probs_N = gate_1H.expand(rows, -1), up_1H.expand(rows, -1), torch.ones(rows, device="cuda")
    hidden_NH, masks_NW, gates_NK, ups_NK, threshold_N = kernels.select_and_gate(gate_NH, up_NH, probs_N, k, "silu")
    dgate_NH, dup_NH, dprobs_N = kernels.select_and_gate_backward(up_NH, masks_NW, gates_NK, ups_NK, probs_N, "silu")
    one = kernels.select_and_gate(gate_1H, up_1H, probs_N[:1], k, "silu")
    one += kernels.select_and_gate_backward(up_1H, *one[1:4], probs_N[:1], "silu")
    errors = Errors(["last"])
    many = (hidden_NH, masks_NW, gates_NK, ups_NK, threshold_N, dgate_NH, dup_NH, dprobs_N)
    for name, ours, right in zip(
        ("hidden", "masks", "gates", "ups", "threshold", "dgate", "dup", "dprobs"), many, one, strict=True
    ):
        errors.require(name, ours[-1:].reshape(1, -1) == right.reshape(1, -1))
    return errors


def check_experts(device: str, dtypes: tuple[str, ...], width: int, neurons: int, rows: int) -> Iterator[Record]:
    """The backend `grouped`, values and gradients, with all neurons and a quarter of them."""
    use_interpreted_kernels()
    for dtype in dtypes:
        for share, some in ((1.0, rows), (0.25, rows), (0.25, 0)):
            name = f"experts grouped {dtype} ratio {share:g}, {some} rows"
            k = round(share * neurons)
            yield recorded(name, functools.partial(compare_experts, device, DTYPES[dtype], width, neurons, k, some))


def compare_experts(device: str, dtype: torch.dtype, width: int, neurons: int, k: int, rows: int) -> Errors:
    """`grouped` against float64, for the neurons that it keeps. By norms, since they are products of products."""
    generator = torch.Generator().manual_seed(0)
    tokens_E = torch.tensor([0, 1, 2, 3, 5, 8, 13, 18]) * rows // 50  # one expert has none
    experts, rows = len(tokens_E), int(tokens_E.sum())

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).to(device, dtype).requires_grad_()

    x_ND, dout_ND = random(rows, width), random(rows, width).detach()
    gate_up_E2HD = random(experts, 2, neurons, width, scale=width**-0.5)
    down_EHD = random(experts, neurons, width, scale=neurons**-0.5)
    probs_N = torch.rand(rows, generator=generator).to(device).requires_grad_()
    inputs, tokens_E = [x_ND, gate_up_E2HD, down_EHD, probs_N], tokens_E.to(device)
    weights = BACKENDS["grouped"].prepare(gate_up_E2HD, down_EHD)
    out_ND = BACKENDS["grouped"].compute(weights, x_ND, tokens_E, probs_N, Request(TopK(k), "silu")).out_ND
    gradients = torch.autograd.grad(out_ND, inputs, dout_ND)

    # By its own GEMM: one that rounds otherwise would choose otherwise.
    with torch.no_grad():
        gate_NH, up_NH = expert_gemm(x_ND, gate_up_E2HD.flatten(1, 2).transpose(1, 2), tokens_E).chunk(2, dim=-1)
        mask_NH = unpack(select_and_gate(gate_NH, up_NH, probs_N, k).masks_NW, neurons)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x_ND, gate_up_E2HD, down_EHD, probs_N = doubles
    parts = []
    for expert, some in enumerate(torch.arange(rows, device=device).split(tokens_E.tolist())):
        gate_nH, up_nH = (x_ND[some] @ gate_up_E2HD[expert, half].T for half in range(2))
        hidden_nH = ACTIVATIONS["silu"].function(gate_nH) * up_nH * mask_NH[some] * probs_N[some, None]
        parts.append(hidden_nH @ down_EHD[expert])
    right_ND = torch.cat(parts)
    rights = (right_ND.detach(), *torch.autograd.grad(right_ND, doubles, dout_ND.double()))

    errors = Errors(["all"])
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    ours = (out_ND.detach(), *gradients)
    for name, result, right in zip(("out", "dx", "dgate_up", "ddown", "dprobs"), ours, rights, strict=True):
        error = (result.double() - right).norm() / right.norm().clamp_min(1e-30)
        errors.add(name, (error / allowed).view(1, 1))
    return errors
