"""The Mixture of Neuron Experts transformer, on Megatron-Core."""

from mone_model import megatron_cpu

megatron_cpu.install()
