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

    Entry points call it before they import Megatron-Core. Where CUDA is not available it replaces functions of Megatron-Core
    (`cpu_support`), and torch's matrix products on processors for which torch chooses a slow library (`cpu_gemm`).
    UserError if the version of Megatron-Core is not supported.
    """
    # Read when torch's allocator is first used: large tensors on the CPU use large pages, if the system allows it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from mone_model.megatron import cpu_gemm, cpu_support, versions

    versions.check_version()
    if not torch.cuda.is_available():
        cpu_support.apply()
        cpu_gemm.install()
    versions.repair_without_transformer_engine()
