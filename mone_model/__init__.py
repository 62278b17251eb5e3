"""The Mixture of Neuron Experts transformer, on Megatron-Core."""

from mone_model import megatron_cpu

megatron_cpu.install()

from mone_model import megatron_versions  # noqa: E402  imports Megatron-Core, which must find the CPU ready

megatron_versions.repair_without_transformer_engine()
