"""Prints the registers, stack and shared memory of the GPU kernels, and the weights that experts for a few rows read.

    python -m benchmarks.triton_resources

The compiler needs no GPU. The stack contains spilled registers; it should be empty, or a few bytes if ptxas spills to fit
another program. Kernels of selection are compiled for every launch configuration of the autotuner, those for a few rows for
the only one they have. The tables do not predict speed.
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

from benchmarks.gpu.traffic import bound, count_traffic
from mone_model.kernels.triton import decode
from mone_model.kernels.triton.selection import GRAIN, backward_kernel, block_size, forward_kernel, launch_options

CAPABILITIES = (80, 90, 100)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KERNELS = {"forward": forward_kernel, "backward": backward_kernel}
NEURONS = (512, 4096, 16384)
POINTERS = {
    "masks_ptr": "*i16", "experts_ptr": "*i32", "ids_ptr": "*i32", "counts_ptr": "*i32",
    **dict.fromkeys(("probs_ptr", "dprobs_ptr", "threshold_ptr", "values_ptr", "parts_ptr"), "*fp32"),
}  # fmt: skip
"""Types of arguments that are not in the dtype of the activations."""


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
    kernel: Any,
    dtype: torch.dtype,
    capability: int,
    warps: int,
    constants: dict[str, Any],
    pointers: dict[str, str] = POINTERS,
) -> Any:
    """Compile a kernel for arguments as the launches of this project give them.

    constants: values of its constexpr arguments, others are left out. pointers: types of arguments.
    """
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, f"*{DTYPES[dtype]}") if name.endswith("_ptr") else "i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {name: constants[name] for name in signature if name in constants}, attributes)
    # Fused multiply-add is the default, but Triton warns unless the option is set explicitly.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources_of(name: str, dtype: torch.dtype, neurons: int, capability: int, warps: int, compiled: Any) -> Resources:
    """What a compiled kernel needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {kind: int(number) for kind, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.partition("Function")[2])}
    stack, shared = used["STACK"] + used["LOCAL"], compiled.metadata.shared
    return Resources(name, DTYPES[dtype], neurons, f"sm_{capability}", warps, used["REG"], stack, shared)


def resources(name: str, dtype: torch.dtype, neurons: int, capability: int, activation: str = "silu") -> Iterator[Resources]:
    """Compile a kernel of selection with each launch configuration for rows of `neurons` neurons."""
    for options in launch_options(neurons):
        constants = {
            "ACTIVATION": activation,
            "GRAIN": GRAIN[dtype],
            "BLOCK": block_size(neurons),
            "CHUNK": options["CHUNK"],
        }
        warps = options["num_warps"]
        compiled = compile_kernel(KERNELS[name], dtype, capability, warps, constants)
        yield resources_of(name, dtype, neurons, capability, warps, compiled)


def decode_resources(
    dtype: torch.dtype, neurons: int, width: int, capability: int, activation: str = "silu"
) -> Iterator[Resources]:
    """Compile the kernels for a few rows, for experts of `neurons` neurons and `width` columns."""
    options = decode.select_options(neurons)
    selection = {"ACTIVATION": activation, "GRAIN": GRAIN[dtype], "BLOCK": block_size(neurons), "CHUNK": options["CHUNK"]}
    columns, few = decode.columns_of(width, decode.MOST_COLUMNS), decode.columns_of(width, decode.SUM_COLUMNS)
    sums = {"ROWS": 8, "SLOTS": decode.PARTS.value, "COLUMNS": few}
    kernels: dict[str, tuple[Any, int, dict[str, Any]]] = {
        "select": (decode.select_kernel, options["num_warps"], selection | {"BY_THRESHOLD": False}),
        "by threshold": (decode.select_kernel, options["num_warps"], selection | {"BY_THRESHOLD": True}),
        "up, down": (decode.up_down_kernel, decode.WARPS, {"COLUMNS": columns}),
        "sum": (decode.sum_kernel, decode.SUM_WARPS, sums),
    }
    for name, (kernel, warps, constants) in kernels.items():
        # The sparse products are in fp32; `hidden` of selection is not.
        pointers = POINTERS | {"hidden_ptr": "*fp32"}
        compiled = compile_kernel(kernel, dtype, capability, warps, constants, pointers)
        yield resources_of(name, dtype, neurons, capability, warps, compiled)


def print_traffic(neurons: int = 1408, width: int = 2048, experts: int = 16) -> None:
    """Print the weights that rows with random lists read, as shares of those of the dense experts, in bf16."""
    print("\nweights read, as a share of all weights of the experts that have rows; sums and lists in the last column")
    print(" ".join(f"{name:>12}" for name in ("ratio", "rows each", "once", "bound", "by each row", "others")))
    generator = torch.Generator().manual_seed(0)
    for ratio in (0.5, 0.25, 0.1):
        for rows in (1, 2, 4, 8):
            k = round(ratio * neurons)
            scores_NH = torch.rand(experts * rows, neurons, generator=generator)
            ids_NS = scores_NH.topk(k).indices.sort().values.int()
            kept = decode.Kept(ids_NS, scores_NH, torch.full((experts * rows,), k, dtype=torch.int32))
            experts_N = torch.arange(experts).repeat_interleave(rows)
            traffic = count_traffic(kept, experts_N, neurons=neurons, width=width, itemsize=2)
            parts = (traffic.once, bound(ratio, rows) * traffic.dense, traffic.gates + traffic.requested, traffic.others)
            shares = " ".join(f"{part / traffic.dense:>12.3f}" for part in parts)
            print(f"{ratio:>12} {rows:>12} {shares}", flush=True)


def main() -> None:
    """Print the tables."""
    print(" ".join(f"{field.name:>12}" for field in fields(Resources)))
    for dtype in (torch.float32, torch.bfloat16):
        for neurons in NEURONS:
            for capability in CAPABILITIES:
                for name in KERNELS:
                    for row in resources(name, dtype, neurons, capability):
                        print(" ".join(f"{value:>12}" for value in astuple(row)), flush=True)
                for row in decode_resources(dtype, neurons, 2048, capability):
                    print(" ".join(f"{value:>12}" for value in astuple(row)), flush=True)
    print_traffic()


if __name__ == "__main__":
    main()
