"""Where Megatron-Core 0.16.1 and 0.19 differ: the only place that knows."""

import functools
from typing import Any

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe.moe_layer import MoESubmodules


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
