"""Kernels for CPUs, compiled at first use."""
