"""Prints the registers, stack and shared memory of the GPU kernels, for every launch configuration of the autotuner.

    python -m benchmarks.triton_resources

The compiler needs no GPU. The stack contains spilled registers; it should be empty, or a few bytes if ptxas spills to fit
another program. The table does not predict speed.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mone_model.kernels.triton.selection import GRAIN, backward_kernel, block_size, forward_kernel, launch_options

CAPABILITIES = (80, 90)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KERNELS = {"forward": forward_kernel, "backward": backward_kernel}
NEURONS = (512, 4096, 16384)


@dataclass(frozen=True)
class Resources:
    """One compiled kernel and its resources."""

    kernel: str
    dtype: str
    neurons: int
    capability: str
    warps: int
    registers: int
    """Per thread."""
    stack: int
    """Bytes of spilled registers per thread."""
    shared: int
    """Bytes of shared memory per program."""


def compile_kernel(
    kernel: Any, dtype: torch.dtype, neurons: int, options: dict[str, int], capability: int, activation: str
) -> Any:
    """Compile a kernel for rows of `neurons` neurons; options: one of its `launch_options`."""
    constants = {"ACTIVATION": activation, "GRAIN": GRAIN[dtype], "BLOCK": block_size(neurons), "CHUNK": options["CHUNK"]}
    pointers = {"masks_ptr": "*i16", "probs_ptr": "*fp32", "dprobs_ptr": "*fp32", "threshold_ptr": "*fp32"}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, f"*{DTYPES[dtype]}") if name.endswith("_ptr") else "i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {name: constants[name] for name in signature if name in constants}, attributes)
    # Fused multiply-add is the default, but Triton warns unless the option is set explicitly.
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": options["num_warps"], "enable_fp_fusion": True},
    )


def resources(name: str, dtype: torch.dtype, neurons: int, capability: int, activation: str = "silu") -> Iterator[Resources]:
    """Compile a kernel with each launch configuration for rows of `neurons` neurons."""
    for options in launch_options(neurons):
        compiled = compile_kernel(KERNELS[name], dtype, neurons, options, capability, activation)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.partition("Function")[2]))
        yield Resources(
            name,
            DTYPES[dtype],
            neurons,
            f"sm_{capability}",
            options["num_warps"],
            int(used["REG"]),
            int(used["STACK"]) + int(used["LOCAL"]),
            compiled.metadata.shared,
        )


def main() -> None:
    """Print the table of resources."""
    print(" ".join(f"{field.name:>10}" for field in fields(Resources)))
    for name in KERNELS:
        for dtype in (torch.float32, torch.bfloat16):
            for neurons in NEURONS:
                for capability in CAPABILITIES:
                    for row in resources(name, dtype, neurons, capability):
                        print(" ".join(f"{value:>10}" for value in astuple(row)), flush=True)


if __name__ == "__main__":
    main()
