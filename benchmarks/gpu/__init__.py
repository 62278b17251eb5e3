"""One command that checks and measures the GPU kernels: `python -m benchmarks.gpu`."""
