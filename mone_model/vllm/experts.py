"""Routed experts for vLLM on CPUs: this project's backends behind vLLM's interface for experts.

vLLM routes the tokens and calls `NeuronExperts.apply`. The weights are held once, neuron-major (`Weights`): the kernel that
skips dropped neurons and the dense backends read the same memory. `many_rows=all` holds vLLM's own form beside it.

Shapes: T tokens, k experts of a token, D width, E experts on this rank, H neurons of an expert, h of them on this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import replace_parameter

from mone_common.checks import check
from mone_model.expert_backends import BACKENDS, Request, Rule, Weights, route
from mone_model.hf.configuration_mone import top_k
from mone_model.neuron_selection import TopK
from mone_model.vllm.options import Selection, read_selection
from mone_model.vllm.switch import STOCK, Switch, fused_moe, measure, pack, usable_backends

logger = init_logger("vllm.mone")


def current_selection() -> Selection | None:
    """The selection of the model that vLLM is building; None: all neurons."""
    config = get_current_vllm_config()
    model = config.model_config
    return None if model is None else read_selection(config.additional_config, model.hf_text_config)


@dataclass(frozen=True)
class ServedExperts:
    """The experts of a layer, and which backend computes how many rows."""

    weights: Weights
    request: Request
    switch: Switch
    stock: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """vLLM's operator on its own copy of the weights, for `STOCK`."""

    @torch.inference_mode()
    def compute(self, x_TD: torch.Tensor, experts_Tk: torch.Tensor, probs_Tk: torch.Tensor) -> torch.Tensor:
        """[T, D]; an expert of -1 is on another rank."""
        name = self.switch(int((experts_Tk >= 0).sum()))
        if name == STOCK:
            assert self.stock is not None
            return self.stock(x_TD, experts_Tk, probs_Tk)
        return route(BACKENDS[name], self.weights, x_TD, experts_Tk, probs_Tk, self.request)


# torch.compile traces the layers of a model on CPUs; an operator is opaque to it.
@torch.library.custom_op("mone::serve", mutates_args=())
def serve(x_TD: torch.Tensor, experts_Tk: torch.Tensor, probs_Tk: torch.Tensor, name: str) -> torch.Tensor:
    """`ServedExperts.compute` of the experts that have this name in vLLM's forward context."""
    served: ServedExperts = get_forward_context().no_compile_layers[name]
    return served.compute(x_TD, experts_Tk, probs_Tk)


@serve.register_fake
def _(x_TD: torch.Tensor, experts_Tk: Any, probs_Tk: Any, name: Any) -> torch.Tensor:
    return torch.empty_like(x_TD)


def make_served(weights: Weights, rule: Rule, kept: int, activation: str, *, stock_isa: str | None = None) -> ServedExperts:
    """Measure the backends for these weights. kept: neurons that a row keeps here, on average. stock_isa: see `measure`."""
    experts, neurons, width = weights.down_EHD.shape
    dtype = weights.down_EHD.dtype
    names, stock = usable_backends(width, dtype, rule), None
    if stock_isa is not None:
        names = tuple(name for name in names if name == "decode")
        gate_up, down = pack(weights, stock_isa)

        def stock(x_TD: torch.Tensor, experts_Tk: torch.Tensor, probs_Tk: torch.Tensor) -> torch.Tensor:
            return fused_moe(gate_up, down, x_TD, experts_Tk, probs_Tk, activation, stock_isa)

    switch = measure(width, neurons, experts, kept, activation, dtype, backends=names, isa=stock_isa)
    logger.info_once("mone: about %d of %d neurons for each row; %s", kept, neurons, str(switch))
    return ServedExperts(weights, Request(rule, activation), switch, stock)


def rule_on_rank(rule: Rule, ranks: int) -> Rule:
    """The rule for experts whose neurons are split over the tensor-parallel ranks: the K best are those of all ranks."""
    return TopK(rule.k, get_tp_group().device_group) if isinstance(rule, TopK) and ranks > 1 else rule


def check_layout(moe_config: Any, selection: Selection) -> None:
    """ValueError for layouts in which the K best neurons cannot be found, or vLLM's operator cannot be used."""
    parallel, ranks = moe_config.moe_parallel_config, get_tp_group().world_size
    best = selection.thresholds is None
    way_out = "splits the neurons of an expert over data-parallel ranks, too; use --enable-expert-parallel or thresholds"
    check(not best or parallel.tp_size in (1, ranks), "data_parallel_size", parallel.dp_size, way_out)
    if selection.many_rows == "all":
        option = ("mone.many_rows", "all")
        check(not parallel.use_ep, *option, "vLLM's operator for CPUs has no expert parallelism; use select")
        way_out = "the K best of neurons on several ranks are found by dense products only; use thresholds or select"
        check(not best or parallel.tp_size == 1, *option, way_out)
        neurons, multiple = moe_config.intermediate_size_per_partition, NeuronExperts.output_alignment
        way_out = f"vLLM's operator needs a multiple of {multiple} neurons on each rank, not {neurons}; use select"
        check(neurons % multiple == 0, *option, way_out)


class NeuronExperts(CPUUnquantizedExperts):
    """Experts that keep, for each row, some of their neurons."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        selection = current_selection()
        assert selection is not None, "NeuronMethod takes this class for models that select neurons"
        self.selection = selection
        self.names = get_current_vllm_config().compilation_config.static_forward_context
        self.name = ""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the weights into neuron-major form; vLLM's is [E, 2h, D] and [E, D, h]."""
        replace_parameter(layer, "w2_weight", layer.w2_weight.data.transpose(1, 2).contiguous())
        neurons, ranks = layer.w2_weight.size(1), self.moe_config.moe_parallel_config.tp_size
        weights = Weights(layer.w13_weight.data.unflatten(1, (2, neurons)), layer.w2_weight.data)
        rule = self.selection.rule(extract_layer_index(layer.layer_name), neurons * ranks)
        kept = top_k(self.selection.ratio, neurons)
        isa = None
        if self.selection.many_rows == "all":
            _, stock = select_unquantized_moe_backend(self.moe_config)
            isa = stock.isa
        self.name = f"{layer.layer_name}.neurons"
        self.names[self.name] = make_served(
            weights, rule_on_rank(rule, ranks), kept, self.selection.activation, stock_isa=isa
        )

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
        *_: Any,
        **__: Any,
    ) -> None:
        """See vLLM's `FusedMoEExpertsModular`. The activation is that of the model, of which vLLM has only some."""
        if expert_map is not None:
            topk_ids = expert_map[topk_ids.long()]
        output.copy_(serve(hidden_states, topk_ids, topk_weights, self.name))
