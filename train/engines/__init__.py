"""Training engines. All implement the protocol `train.engines.base.Engine`."""

from typing import TYPE_CHECKING

from train.config import RunConfig

if TYPE_CHECKING:  # importing the options of an engine (deepspeed_config) must not import Megatron-Core
    from mone_model.weight_sources import WeightSource
    from train.engines.base import Engine
    from train.runtime import Runtime


def build_engine(config: RunConfig, runtime: "Runtime", weights: "WeightSource | None" = None) -> "Engine":
    """The engine that `config.engine` names; weights: gives the initial weights, None: they are random."""
    if config.engine == "deepspeed":
        from train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, runtime, weights)
    from train.engines.megatron import MegatronEngine

    return MegatronEngine(config, runtime, weights)
