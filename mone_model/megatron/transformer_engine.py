"""Whether the layers are Transformer Engine's. Imports neither Megatron-Core nor Transformer Engine."""

import importlib.util

from mone_model.config import ComputeConfig


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def uses_transformer_engine(compute: ComputeConfig) -> bool:
    """Whether `compute.transformer_impl` selects Transformer Engine on this machine: it needs a GPU."""
    if compute.transformer_impl == "local" or not has_transformer_engine():
        return False
    import torch

    return torch.cuda.is_available()
