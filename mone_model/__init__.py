"""The Mixture of Neuron Experts transformer, on Megatron-Core."""

import os

# Read when torch's allocator is first used: large tensors on the CPU lie in large pages, if the system lets them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from mone_model import cpu_gemm, megatron_cpu

megatron_cpu.install()
if not torch.cuda.is_available():
    cpu_gemm.install()

from mone_model import megatron_versions  # noqa: E402  imports Megatron-Core, which must find the CPU ready

megatron_versions.repair_without_transformer_engine()
