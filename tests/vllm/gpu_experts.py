"""Runs in vLLM's interpreter: the experts for GPUs on a CPU, vLLM's grouped GEMM and our kernels in Triton's interpreter.

python gpu_experts.py       # prints one line of JSON: the largest error of each case, and what was measured and refused

What vLLM has for CUDA only is replaced: the assignment of rows to blocks of the GEMM, the sum over the experts of a token,
and the timer.
"""

import os

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "WARNING"}

import json
import types
from typing import Any

import torch
from vllm import platforms

platforms.current_platform.is_cpu()  # decides which platform it is
# vLLM for CPUs would replace Triton by a placeholder.
platforms.vllm_version_matches_substr = lambda substr: False

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.fused_moe import fused_moe  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402
from vllm.model_executor.layers.fused_moe.config import (  # noqa: E402
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)

from mone_model import neuron_selection  # noqa: E402
from mone_model.expert_backends import BACKENDS, Request, Weights, route  # noqa: E402
from mone_model.kernels.triton import selection as triton_selection  # noqa: E402
from mone_model.vllm import gpu_experts, method  # noqa: E402
from mone_model.vllm.options import Selection  # noqa: E402

WIDTH, NEURONS, EXPERTS, TOPK = 32, 24, 16, 2


def align(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    ignore_invalid_experts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What vLLM's operator computes: the rows of each expert, padded to blocks, and the expert of each block."""
    ids = (topk_ids if expert_map is None else expert_map[topk_ids.long()]).flatten()
    rows: list[int] = []
    blocks: list[int] = []
    for expert in range(num_experts):
        of_expert = (ids == expert).nonzero().flatten().tolist()
        padding = -len(of_expert) % block_size
        rows += of_expert + [len(ids)] * padding
        blocks += [expert] * ((len(of_expert) + padding) // block_size)
    return torch.tensor(rows).int(), torch.tensor(blocks).int(), torch.tensor([len(rows)]).int()


def sum_of_tokens(_: Any, parts: torch.Tensor, output: torch.Tensor, topk_ids: Any, expert_map: Any) -> None:
    """The sum over the experts of a token, of those on this rank."""
    if expert_map is not None:
        parts = parts.masked_fill((expert_map[topk_ids.long()] < 0)[..., None], 0)
    output.copy_(parts.sum(1))


fused_moe.moe_align_block_size = align
gpu_experts.NeuronTritonExperts.moe_sum = sum_of_tokens
neuron_selection._kernels_for = lambda tensor: triton_selection


class Layer(torch.nn.Module):
    """What vLLM gives to the experts after it has loaded the weights."""

    layer_name = "model.layers.1.mlp.experts"
    activation = MoEActivation.SILU

    def __init__(self, gate_up_E2HD: torch.Tensor, down_EHD: torch.Tensor) -> None:
        super().__init__()
        self.w13_weight = torch.nn.Parameter(gate_up_E2HD.flatten(1, 2).clone(), requires_grad=False)
        self.w2_weight = torch.nn.Parameter(down_EHD.transpose(1, 2).contiguous(), requires_grad=False)


def make_config(neurons: int = NEURONS) -> FusedMoEConfig:
    return FusedMoEConfig(
        num_experts=EXPERTS, experts_per_token=TOPK, hidden_dim=WIDTH, intermediate_size=neurons,
        num_local_experts=EXPERTS, num_logical_experts=EXPERTS, activation=MoEActivation.SILU, device="cpu",
        routing_method=RoutingMethodType.TopK, moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.float32,
    )  # fmt: skip


def error_of(selection: Selection, tokens: int, most_tokens: int, local: int) -> float:
    """Largest difference from the backend `loop`. local: how many of the experts are on this rank."""
    generator = torch.Generator().manual_seed(tokens)
    gate_up_E2HD = torch.randn(local, 2, NEURONS, WIDTH, generator=generator).mul_(WIDTH**-0.5)
    down_EHD = torch.randn(local, NEURONS, WIDTH, generator=generator).mul_(NEURONS**-0.5)
    x_TD = torch.randn(tokens, WIDTH, generator=generator)
    probs_Tk = torch.rand(tokens, TOPK, generator=generator)
    experts_Tk = torch.rand(tokens, EXPERTS, generator=generator).topk(TOPK).indices.int()
    expert_map = None
    if local < EXPERTS:
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[3 : 3 + local] = torch.arange(local, dtype=torch.int32)

    gpu_experts.current_selection = lambda: selection
    gpu_experts._measured.clear()
    gpu_experts.measure = lambda time: most_tokens
    experts, layer = (
        gpu_experts.NeuronTritonExperts(make_config(), FUSED_MOE_UNQUANTIZED_CONFIG),
        Layer(gate_up_E2HD, down_EHD),
    )
    experts.timed = lambda layer: None  # type: ignore[method-assign,assignment,return-value]
    experts.process_weights_after_loading(layer)
    output_TD = torch.full_like(x_TD, torch.nan)
    first, second = (torch.full((tokens * TOPK * 2 * max(NEURONS, WIDTH),), torch.nan) for _ in range(2))
    experts.apply(
        output_TD, x_TD, layer.w13_weight, layer.w2_weight, probs_Tk, experts_Tk, layer.activation, EXPERTS, expert_map,
        None, None, first, second, None, False,
    )  # fmt: skip
    here_Tk = experts_Tk if expert_map is None else expert_map[experts_Tk.long()]
    request = Request(selection.rule(1, NEURONS), selection.activation)
    right_TD = route(BACKENDS["loop"], Weights(gate_up_E2HD, down_EHD), x_TD, here_Tk, probs_Tk, request)
    return float((output_TD - right_TD).abs().max())


def errors() -> dict[str, float]:
    """By case."""
    by_rule = {
        "best": Selection(0.25, None, "silu"),
        "all, relu": Selection(1.0, None, "relu"),
        "threshold": Selection(0.25, {0: 9.0, 1: 0.1}, "gelu"),
    }
    found = {}
    for name, selection in by_rule.items():
        for tokens, local in ((1, EXPERTS), (9, EXPERTS), (9, 4)):
            for way, most in (("skipping", 64), ("dense", 0)):
                found[f"{name}, {way}, {tokens} tokens, {local} experts"] = error_of(selection, tokens, most, local)
    return found


def shared_error() -> float:
    """Of a shared expert."""
    weights = Weights(torch.randn(1, 2, NEURONS, WIDTH), torch.randn(1, NEURONS, WIDTH))
    x_TD, rule = torch.randn(5, WIDTH), neuron_selection.TopK(7)
    ours_TD = gpu_experts.SharedExpert(weights, rule, "silu").compute(x_TD)
    first_T1, ones_T1 = torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1)
    right_TD = route(BACKENDS["loop"], weights, x_TD, first_T1, ones_T1, Request(rule, "silu"))
    return float((ours_TD - right_TD).abs().max())


def refusals() -> list[str]:
    """Messages for layouts that cannot be computed."""
    best, by_threshold = Selection(0.25, None, "silu"), Selection(0.25, {1: 0.1}, "silu")

    def layout(**options: Any) -> types.SimpleNamespace:
        parallel = {"tp_size": 1, "use_batched_activation_format": False, "all2all_backend": "deepep_low_latency"}
        its = {name: options.pop(name, default) for name, default in parallel.items()}
        config = {"is_lora_enabled": False, "intermediate_size_per_partition": 64} | options
        return types.SimpleNamespace(moe_parallel_config=types.SimpleNamespace(**its), **config)

    gpu_experts.check_layout(layout(), best)
    gpu_experts.check_layout(layout(tp_size=2), by_threshold)
    messages = []
    for options in (
        {"tp_size": 2},
        {"use_batched_activation_format": True},
        {"is_lora_enabled": True},
        {"intermediate_size_per_partition": 16385},
    ):
        try:
            gpu_experts.check_layout(layout(**options), best)
        except ValueError as error:
            messages.append(str(error))
    return messages


def chosen() -> list[str]:
    """Backend and experts of a layer without quantization on a platform with CUDA."""
    gpu_experts.current_selection = method.current_selection = lambda: Selection(0.25, None, "silu")
    method.current_platform = types.SimpleNamespace(is_cuda_alike=lambda: True)
    its = method.NeuronMethod(make_config(neurons=64))
    return [its.unquantized_backend.name, its.experts_cls.__name__]


def main() -> None:
    """Print the results."""
    measure = gpu_experts.measure
    measured = [
        measure(lambda tokens, skip: tokens if skip else 5),
        measure(lambda *_: 1.0),
        measure(lambda _, skip: 2.0 - skip),
    ]
    with set_current_vllm_config(VllmConfig()):
        results = {"errors": errors(), "shared": shared_error(), "measured": measured, "refusals": refusals()}
        results["chosen"] = chosen()
    print("RESULT", json.dumps(results))


if __name__ == "__main__":
    main()
