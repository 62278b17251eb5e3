"""Routed experts for vLLM on GPUs: vLLM's Triton experts with a selection of neurons. They have not run on a GPU.

Few tokens: vLLM's grouped GEMM computes the gates, and the kernels of `mone_model.kernels.triton.decode` the rest. Weights
up and down of dropped neurons are not read. Many tokens: vLLM's grouped GEMMs compute gates, ups and the output, and neurons
are selected between them. Nothing waits for the host, so that vLLM's CUDA graphs can hold all of it.

The weights are held once, neuron-major: vLLM's [E, D, h] of the down projection is a view of [E, h, D].

Shapes: T tokens, k experts of a token, R = T k rows, D width, E experts on this rank, H neurons of an expert, h of them on
this rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.experts import triton_moe
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import replace_parameter
from vllm.triton_utils import tl

from mone_common.checks import check
from mone_model.activations import ACTIVATIONS
from mone_model.expert_backends import Rule, Weights
from mone_model.hf.configuration_mone import top_k
from mone_model.kernels.triton import decode
from mone_model.kernels.triton.selection import MAX_NEURONS
from mone_model.neuron_selection import TopK, scores_of, select_and_gate
from mone_model.vllm.experts import current_selection
from mone_model.vllm.options import Selection

logger = init_logger("vllm.mone")

TOKENS = (1, 2, 4, 8, 16, 32, 64)
"""The numbers of tokens that are measured."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_measured: dict[tuple[Any, ...], int] = {}


def check_layout(moe_config: Any, selection: Selection) -> None:
    """ValueError for what these experts cannot compute."""
    parallel, neurons = moe_config.moe_parallel_config, moe_config.intermediate_size_per_partition
    way_out = "the K best of neurons on several GPUs are not supported; use --enable-expert-parallel or thresholds"
    check(selection.thresholds is not None or parallel.tp_size == 1, "tensor_parallel_size", parallel.tp_size, way_out)
    batched = parallel.use_batched_activation_format
    check(not batched, "all2all_backend", parallel.all2all_backend, "sends tokens in a form that the plugin does not read")
    check(not moe_config.is_lora_enabled, "enable_lora", True, "the plugin mone has no LoRA")
    way_out = f"the kernels of the plugin mone select from at most {MAX_NEURONS} neurons on each rank"
    check(neurons <= MAX_NEURONS, "intermediate_size", neurons, way_out)


def select(gate_up_RG: torch.Tensor, rule: Rule, activation: str) -> torch.Tensor:
    """[R, 2h] gates, then ups -> [R, h] act(gate) * up of the neurons that are kept, 0 elsewhere."""
    gate_Rh, up_Rh = gate_up_RG.chunk(2, dim=-1)
    if isinstance(rule, TopK):
        ones_R = torch.ones(len(gate_Rh), device=gate_Rh.device)
        return select_and_gate(gate_Rh, up_Rh, ones_R, rule.k, activation).hidden_NH
    active_Rh = ACTIVATIONS[activation].function(gate_Rh.float())
    return (active_Rh * up_Rh).masked_fill_(scores_of(active_Rh) < rule.threshold, 0).to(up_Rh.dtype)


class SharedExpert:
    """One expert of all tokens, with dense products: what `mone_model.vllm.experts.serve` calls on GPUs."""

    def __init__(self, weights: Weights, rule: Rule, activation: str) -> None:
        self.weights, self.rule, self.activation = weights, rule, activation

    def compute(self, x_TD: torch.Tensor, *_: Any) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        gate_up_E2HD, down_EHD = self.weights
        gate_up_TG = x_TD @ gate_up_E2HD.flatten(1, 2)[0].T
        return select(gate_up_TG, self.rule, self.activation) @ down_EHD[0]


class NeuronTritonExperts(TritonExperts):
    """Experts that keep, for each row, some of their neurons."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        selection = current_selection()
        assert selection is not None, "NeuronMethod takes this class for models that select neurons"
        self.selection = selection
        self.rule: Any = None
        self.most_tokens = 0
        """Up to so many tokens, weights of dropped neurons are skipped."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the weights into neuron-major form, and measure up to how many tokens skipping is faster."""
        down_EhD = layer.w2_weight.data.transpose(1, 2).contiguous()
        replace_parameter(layer, "w2_weight", down_EhD.transpose(1, 2))
        neurons, ranks = down_EhD.size(1), self.moe_config.moe_parallel_config.tp_size
        self.rule = self.selection.rule(extract_layer_index(layer.layer_name), neurons * ranks)
        key = (*down_EhD.shape, down_EhD.dtype, self.moe_config.experts_per_token, self.selection.ratio)
        if key not in _measured:
            _measured[key] = measure(self.timed(layer))
        self.most_tokens = _measured[key]
        kept = top_k(self.selection.ratio, neurons)
        logger.info_once("mone: %d of %d neurons; the others are skipped up to %d tokens", kept, neurons, self.most_tokens)

    def timed(self, layer: Any) -> Callable[[int, bool], float]:
        """A function (number of tokens, whether to skip) -> milliseconds, for random tokens in the experts of this layer."""
        from triton.testing import do_bench_cudagraph

        w1, w2 = layer.w13_weight.data, layer.w2_weight.data
        (experts, both, width), generator = w1.shape, torch.Generator(w1.device).manual_seed(0)

        def time(tokens: int, skip: bool) -> float:
            x_TD = torch.randn(tokens, width, generator=generator, device=w1.device).to(w1.dtype)
            # Different experts, so that not all weights are in the cache.
            scores_CTE = torch.rand(8, tokens, experts, generator=generator, device=w1.device)
            experts_CTk = scores_CTE.topk(min(self.moe_config.experts_per_token, experts)).indices.int()
            probs_Tk = torch.ones(tokens, experts_CTk.size(2), device=w1.device)
            out_TD, space = torch.empty_like(x_TD), probs_Tk.numel() * max(both, width)
            first, second = x_TD.new_empty(space), x_TD.new_empty(space)
            self.most_tokens = tokens if skip else 0

            def run() -> None:
                for experts_Tk in experts_CTk:
                    self.apply(
                        out_TD, x_TD, w1, w2, probs_Tk, experts_Tk, layer.activation, experts, None, None, None, first,
                        second, None, False,
                    )  # fmt: skip

            return do_bench_cudagraph(run, rep=5)

        return time

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """See vLLM's `FusedMoEExpertsModular`. The activation is that of the model, of which vLLM has only some."""
        assert not apply_router_weight_on_input, "no supported model has its routing weights on the input"
        (tokens, topk), neurons, width = topk_ids.shape, w2.size(2), hidden_states.size(1)
        config_name = self.quant_config.config_name(hidden_states.dtype)
        config = triton_moe.try_get_optimal_moe_config(w1.size(), w2.size(), topk, config_name, tokens)
        assignment = triton_moe._prepare_expert_assignment(
            topk_ids, config, tokens, topk, len(w1) if expert_map is None else global_num_experts, expert_map,
            ignore_invalid_experts=expert_map is not None,
        )  # fmt: skip

        def multiply(
            rows: torch.Tensor, weights: torch.Tensor, result: torch.Tensor, factors: torch.Tensor | None, share: int
        ) -> None:
            # vLLM's grouped GEMM. share: rows of the result for each row.
            triton_moe.invoke_fused_moe_triton_kernel(
                rows, weights, result, None, None, factors, *assignment, factors is not None, share, config,
                compute_type=TYPES[rows.dtype], use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False,
                use_int4_w4a16=False, per_channel_quant=False,
            )  # fmt: skip

        rule, name = self.rule, self.selection.activation
        if tokens <= self.most_tokens:
            gate_Tkh = triton_moe._resize_cache(workspace2, (tokens, topk, neurons))
            multiply(hidden_states, w1[:, :neurons], gate_Tkh, None, topk)
            experts_R = (topk_ids if expert_map is None else expert_map[topk_ids.long()]).flatten().int()
            k, threshold = (rule.k, None) if isinstance(rule, TopK) else (0, rule.threshold)
            gate_Rh, probs_R = gate_Tkh.flatten(0, 1), topk_weights.flatten()
            kept = decode.select_rows(gate_Rh, probs_R, experts_R, k, name, threshold=threshold)
            gate_up_E2hD, down_EhD = w1.unflatten(1, (2, neurons)), w2.transpose(1, 2)
            output.copy_(decode.up_down(hidden_states, gate_up_E2hD, down_EhD, experts_R, kept))
            return
        gate_up_TkG = triton_moe._resize_cache(workspace2, (tokens, topk, 2 * neurons))
        multiply(hidden_states, w1, gate_up_TkG, None, topk)
        if self.selection.many_rows == "all":
            hidden_Rh = triton_moe._resize_cache(workspace13, (tokens * topk, neurons))
            self.activation(activation, hidden_Rh, gate_up_TkG.flatten(0, 1))
        else:
            hidden_Rh = select(gate_up_TkG.flatten(0, 1), rule, name)
        out_TkD = triton_moe._resize_cache(workspace2, (tokens, topk, width))
        multiply(hidden_Rh, w2, out_TkD, topk_weights, 1)
        self.moe_sum(out_TkD, output, topk_ids, expert_map)


def measure(time: Callable[[int, bool], float]) -> int:
    """The largest of `TOKENS` up to which skipping is faster by more than noise; 0 if it never is. time: of `timed`."""
    most = 0
    for tokens in TOKENS:
        if time(tokens, True) > 0.97 * time(tokens, False):
            break
        most = tokens
    return most
