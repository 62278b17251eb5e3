"""The only place that knows where Megatron-Core 0.16.1 and 0.19 differ, and what 0.16.1 lacks without Transformer Engine."""

import functools
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoESubmodules

from mone_model.megatron.transformer_engine import has_transformer_engine


def repair_without_transformer_engine() -> None:
    """Define a name that the router's gate needs, and let torch's AdamW load sharded state; on CPUs and GPUs alike."""
    if has_transformer_engine():
        return
    if not hasattr(moe_utils, "te_general_gemm"):  # a NameError in 0.16.1
        moe_utils.te_general_gemm = None

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states_except_step(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        # torch's AdamW keeps a step per parameter, which the sharded state does not hold.
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**tensors, **({"step": state["step"]} if "step" in state else {})})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_except_step


def moe_submodules(layer: ModuleSpec) -> MoESubmodules:
    """The MoE parts of a layer spec: a ModuleSpec's in 0.16, bound to a functools.partial in 0.19."""
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def experts_builder(module: type, **params: Any) -> Any:
    """How MoESubmodules.experts names a class and its parameters: a ModuleSpec in 0.16, a plain builder in 0.19."""
    import megatron.core

    if tuple(int(part) for part in megatron.core.__version__.split(".")[:2]) >= (0, 17):
        return functools.partial(module, **params)
    return ModuleSpec(module=module, params=params)
