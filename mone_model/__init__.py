"""The Mixture of Neuron Experts transformer, on Megatron-Core."""

import torch

from mone_model import cpu_gemm, megatron_cpu

megatron_cpu.install()
if not torch.cuda.is_available():
    cpu_gemm.install()

from mone_model import megatron_versions  # noqa: E402  imports Megatron-Core, which must find the CPU ready

megatron_versions.repair_without_transformer_engine()
