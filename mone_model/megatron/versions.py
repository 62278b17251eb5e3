"""All differences between Megatron-Core 0.16 and 0.19, and what both lack without Transformer Engine."""

import functools
import importlib.metadata
from typing import TYPE_CHECKING, Any

from mone_common.console import UserError
from mone_model.megatron.transformer_engine import has_transformer_engine

if TYPE_CHECKING:
    import torch

SUPPORTED = ((0, 16), (0, 19))
"""Series of Megatron-Core with which the tests pass: 0.16.1 and 0.19.2."""


def _series() -> tuple[int, int]:
    major, minor = importlib.metadata.version("megatron-core").split(".")[:2]
    return int(major), int(minor)


def check_version() -> None:
    """UserError if the installed version of Megatron-Core is not supported."""
    if _series() not in SUPPORTED:
        raise UserError(
            f"megatron-core {importlib.metadata.version('megatron-core')} is not supported; "
            "pip install megatron-core==0.16.1, or on Python 3.12 and later megatron-core==0.19.2"
        )


def repair_without_transformer_engine() -> None:
    """Define a name that the router's gate needs, and let torch's AdamW load sharded state; on CPUs and GPUs alike."""
    if has_transformer_engine():
        return
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # a NameError in 0.16.1
        moe_utils.te_general_gemm = None

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states_except_step(self: Any, model_param: "torch.Tensor", tensors: "dict[str, torch.Tensor]") -> None:
        # torch's AdamW keeps a step per parameter, which the sharded state does not hold.
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**tensors, **({"step": state["step"]} if "step" in state else {})})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_except_step


def save_options() -> dict[str, Any]:
    """Arguments with which `dist_checkpointing.save` of 0.19 does not need nvidia-resiliency-ext, as that of 0.16."""
    return {"async_strategy": "mcore"} if _series() > (0, 16) else {}


def submodules_of(spec: Any) -> Any:
    """The submodules of a module spec: in 0.19 some specs are a functools.partial."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def moe_part(module: type, *, submodules: Any = None, **params: Any) -> Any:
    """The spec of a part of MoESubmodules: a ModuleSpec in 0.16, a function that builds it in 0.19."""
    if _series() > (0, 16):
        return functools.partial(module, **params, **({} if submodules is None else {"submodules": submodules}))
    from megatron.core.transformer import ModuleSpec

    return ModuleSpec(module=module, params=params, submodules=submodules)
