"""The model on Megatron-Core.

from mone_model import megatron

megatron.prepare()                                # once, before the model is built
from mone_model.megatron.gpt import build_gpt
"""

import functools
import os


@functools.cache
def prepare() -> None:
    """Make Megatron-Core run on this machine, once in a process.

    Where CUDA is not available this replaces functions of torch and Megatron-Core (`cpu_support`), and matrix products on
    processors for which torch chooses a slow library (`cpu_gemm`). Entry points call it.
    """
    # Read when torch's allocator is first used: large tensors on the CPU lie in large pages, if the system lets them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from mone_model.megatron import cpu_gemm, cpu_support

    cpu_support.install()
    if not torch.cuda.is_available():
        cpu_gemm.install()

    from mone_model.megatron import versions  # imports Megatron-Core, which must find the CPU ready

    versions.repair_without_transformer_engine()
