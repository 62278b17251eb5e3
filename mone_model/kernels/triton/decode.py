"""GPU kernels: experts for a few rows, forward only. Weights up and down of dropped neurons are not read.

    if decode.decodes(x_ND, neurons):                                        # needs the triton package
        out_ND = decode.decode(x_ND, gate_up_E2HD, down_EHD, probs_N, tokens_E, k, "silu").out_ND

    kept = decode.select_rows(gate_NH, probs_N, experts_N, k, "silu")        # the same, for gates that are there already
    out_TD = decode.up_down(x_TD, gate_up_E2HD, down_EHD, experts_N, kept)

These kernels have not run on a GPU yet. Their numerics are tested in Triton's interpreter (TRITON_INTERPRET=1), and they
compile for sm_80, sm_90 and sm_100 without spilled registers (python -m benchmarks.triton_resources).

The gates of all neurons come from a dense product. Then there are three kernels:

1. `select_kernel`, one program for each row: activation, selection, and compaction into a list of the neurons that the row
   keeps, with act(gate) times routing weight. It selects as `mone_model.kernels.triton.selection` does.
2. `up_down_kernel`, up to PARTS programs for each row, each for a part of its list: the products with the rows of up, then
   the weighted sum of the rows of down. Programs of the rows of one expert are neighbours, so that the weights that they
   share can come from the L2 cache.
3. `sum_kernel`: the sum of the parts of each token, in a fixed order. There are no atomics: results are deterministic, and
   those of a row do not depend on the other rows.

`select_rows` and `up_down` allocate tensors and launch kernels, nothing else: shapes do not depend on the data, lengths of
lists stay on the device, and the host does not wait. A CUDA graph can capture them.

Shapes: T tokens, N rows: row n is token n // (N / T) in expert experts_N[n]. D width, E experts, H neurons of an expert, K
kept, S slots of a list, W = ceil(H / 16) words of a mask.
"""

import contextlib
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mone_model.expert_backends import expert_gemm
from mone_model.kernels.triton.selection import (
    GRAIN,
    INTERPRETED,
    MAX_NEURONS,
    activate,
    block_size,
    launch_options,
    magnitudes,
    mark_best,
    store_mask,
    unpack,
)

PARTS: tl.constexpr = tl.constexpr(64)
"""Most programs of a row: their sums take PARTS times D fp32 numbers of memory for each row."""
TILE: tl.constexpr = tl.constexpr(16)
"""Neurons that a program reads together."""
MOST_COLUMNS, WARPS = 512, 8
"""Columns of the weights that a program reads together, and its warps: 1 KiB of 16-bit numbers from each of TILE rows."""
SUM_COLUMNS, SUM_WARPS = 64, 4
"""The same for the sum of the parts."""


class Kept(NamedTuple):
    """The neurons that each row keeps, in ascending order."""

    ids_NS: torch.Tensor
    """[N, S] int32 neurons; S = K for the K best, H by thresholds. Only the first counts_N[n] of row n are written."""
    values_NS: torch.Tensor
    """[N, S] fp32 act(gate) times routing weight, as far as ids are."""
    counts_N: torch.Tensor
    """[N] int32 neurons of each row: 0 for rows of other ranks."""


class Decoded(NamedTuple):
    """Outputs of the experts for a few rows, and which neurons were kept."""

    out_ND: torch.Tensor
    """[N, D] weighted outputs."""
    kept: Kept
    """Of all rows."""


@triton.jit
def select_kernel(
    gate_ptr,
    probs_ptr,
    experts_ptr,
    masks_ptr,
    ids_ptr,
    values_ptr,
    counts_ptr,
    gate_stride,
    neurons,
    k,
    slots,
    threshold,
    BY_THRESHOLD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the list [S] of one row, and its length. threshold: bits of fp32. masks: [N, W] for this kernel's own use."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(experts_ptr + row) < 0:
        tl.store(counts_ptr + row, 0)
        return
    gate_ptr += row * gate_stride
    masks_ptr += row * ((neurons + 15) // 16)
    ids_ptr += row * slots
    values_ptr += row * slots
    prob = tl.load(probs_ptr + row).to(tl.float32)

    if BY_THRESHOLD:
        bits, _ = magnitudes(gate_ptr, neurons, ACTIVATION, BLOCK)
        store_mask((bits >= threshold) & (bits >= 0), masks_ptr, neurons, BLOCK)
    else:
        mark_best(gate_ptr, masks_ptr, neurons, k, ACTIVATION, GRAIN, BLOCK)

    # One chunk at a time: a long row at once would spill registers.
    before = 0
    for start in range(0, neurons, CHUNK):
        chosen = unpack(masks_ptr, start, neurons, CHUNK)
        position = before + tl.cumsum(chosen) - 1
        before += tl.sum(chosen)
        here = start + tl.arange(0, CHUNK)
        gate = tl.load(gate_ptr + here, mask=chosen > 0, other=0).to(tl.float32)
        tl.store(ids_ptr + position, here, mask=chosen > 0)
        tl.store(values_ptr + position, activate(gate, ACTIVATION) * prob, mask=chosen > 0)
    tl.store(counts_ptr + row, before)


@triton.jit
def _part_size(count):
    # Slots of a list that one program takes: tiles, as few as PARTS programs need for all of them.
    return tl.maximum((count + PARTS * TILE - 1) // (PARTS * TILE), 1) * TILE


@triton.jit
def up_down_kernel(
    x_ptr,
    gate_up_ptr,
    down_ptr,
    experts_ptr,
    ids_ptr,
    values_ptr,
    counts_ptr,
    hidden_ptr,
    parts_ptr,
    rows_of_token,
    neurons,
    width,
    slots,
    parts,
    COLUMNS: tl.constexpr,
):
    """Write the sum [D] over a part of a row's list. hidden: [N, S] for this kernel's own use."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    count = tl.load(counts_ptr + row)
    size = _part_size(count)
    begin = part * size
    if begin >= count:
        return
    end = tl.minimum(begin + size, count)
    expert = tl.load(experts_ptr + row).to(tl.int64)
    x_ptr += row // rows_of_token * width
    up_ptr = gate_up_ptr + (2 * expert + 1) * neurons * width
    down_ptr += expert * neurons * width
    ids_ptr += row * slots
    values_ptr += row * slots
    hidden_ptr += row * slots
    parts_ptr += (row * parts + part) * width
    columns = tl.arange(0, COLUMNS)

    for start in range(begin, end, TILE):
        slot = start + tl.arange(0, TILE)
        neuron = tl.load(ids_ptr + slot, mask=slot < end, other=0).to(tl.int64)
        sums = tl.zeros((TILE, COLUMNS), tl.float32)
        for first in range(0, width, COLUMNS):
            column = first + columns
            x = tl.load(x_ptr + column, mask=column < width, other=0).to(tl.float32)
            where = (slot < end)[:, None] & (column < width)[None, :]
            up = tl.load(up_ptr + neuron[:, None] * width + column[None, :], mask=where, other=0).to(tl.float32)
            sums += up * x[None, :]
        value = tl.load(values_ptr + slot, mask=slot < end, other=0)
        tl.store(hidden_ptr + slot, tl.sum(sums, axis=1) * value, mask=slot < end)
    tl.debug_barrier()  # other threads read hidden
    for first in range(0, width, COLUMNS):
        column = first + columns
        sums = tl.zeros((TILE, COLUMNS), tl.float32)
        for start in range(begin, end, TILE):
            slot = start + tl.arange(0, TILE)
            neuron = tl.load(ids_ptr + slot, mask=slot < end, other=0).to(tl.int64)
            hidden = tl.load(hidden_ptr + slot, mask=slot < end, other=0)
            where = (slot < end)[:, None] & (column < width)[None, :]
            down = tl.load(down_ptr + neuron[:, None] * width + column[None, :], mask=where, other=0).to(tl.float32)
            sums += down * hidden[:, None]
        tl.store(parts_ptr + column, tl.sum(sums, axis=0), mask=column < width)


@triton.jit
def sum_kernel(parts_ptr, counts_ptr, out_ptr, width, parts, ROWS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write some columns of a token's sum [D]. ROWS: its rows. SLOTS: a power of two, at least `parts`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, SLOTS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for its in tl.static_range(ROWS):
        row = token * ROWS + its
        count = tl.load(counts_ptr + row)
        written = part * _part_size(count) < count
        address = (row * parts + part)[:, None] * width + column[None, :]
        found = tl.load(parts_ptr + address, mask=written[:, None] & (column < width)[None, :], other=0)
        total += tl.sum(found, axis=0)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


def select_options(neurons: int) -> dict[str, int]:
    """CHUNK and num_warps of `select_kernel`: as many warps as the registers allow, since there are few rows."""
    return launch_options(neurons)[-1]


def columns_of(width: int, most: int) -> int:
    """COLUMNS: a power of two, no larger than needed for rows of this width."""
    return min(most, max(16, triton.next_power_of_2(width)))


def select_rows(
    gate_NH: torch.Tensor,
    probs_N: torch.Tensor,
    experts_N: torch.Tensor,
    k: int,
    activation: str,
    *,
    threshold: float | None = None,
) -> Kept:
    """The neurons that each row keeps: the k with the largest |act(gate)|, or all that reach the threshold.

    gate_NH: [N, H] before the activation; rows may lie apart, H is at most MAX_NEURONS. probs_N: [N] routing weights.
    experts_N: [N] int32; below 0: the row keeps nothing, and its gates are not read. k: 1 <= k <= H, which the caller has
    checked; not used with a threshold. NaN counts as infinity. Ties go to the lower index.
    """
    assert gate_NH.stride(1) == 1, "the neurons of a row must lie together"
    rows, neurons = gate_NH.shape
    slots = k if threshold is None else neurons
    ids_NS, values_NS = (
        gate_NH.new_empty(rows, slots, dtype=torch.int32),
        gate_NH.new_empty(rows, slots, dtype=torch.float32),
    )
    counts_N = gate_NH.new_empty(rows, dtype=torch.int32)
    masks_NW = gate_NH.new_empty(rows, -(-neurons // 16), dtype=torch.int16)
    _launch(
        select_kernel, (rows,), gate_NH, probs_N.contiguous(), experts_N.contiguous(), masks_NW, ids_NS, values_NS, counts_N,
        gate_NH.stride(0), neurons, k, slots, 0 if threshold is None else _bits(threshold),
        BY_THRESHOLD=threshold is not None, ACTIVATION=activation, GRAIN=GRAIN[gate_NH.dtype], BLOCK=block_size(neurons),
        **select_options(neurons),
    )  # fmt: skip
    return Kept(ids_NS, values_NS, counts_N)


def up_down(
    x_TD: torch.Tensor, gate_up_E2HD: torch.Tensor, down_EHD: torch.Tensor, experts_N: torch.Tensor, kept: Kept
) -> torch.Tensor:
    """[T, D] for each token, the sum over its rows n of sum_s values[n, s] (x . up[ids[n, s]]) down[ids[n, s]].

    x_TD: [T, D]; N is a multiple of T. gate_up_E2HD, down_EHD: [E, 2, H, D] and [E, H, D] in the dtype of x, contiguous.
    experts_N: [N] int32. kept: of `select_rows`. Sums are in fp32, the result is in the dtype of x.
    """
    assert gate_up_E2HD.is_contiguous(), "the weights of a neuron must lie together"
    assert down_EHD.is_contiguous(), "the weights of a neuron must lie together"
    (tokens, width), neurons, (rows, slots) = x_TD.shape, down_EHD.size(1), kept.ids_NS.shape
    out_TD = x_TD.new_empty(tokens, width)
    if tokens == 0:
        return out_TD
    rows_of_token, parts = rows // tokens, min(PARTS.value, triton.cdiv(slots, TILE.value))
    hidden_NS, parts_NPD = torch.empty_like(kept.values_NS), kept.values_NS.new_empty(rows, parts, width)
    _launch(
        up_down_kernel, (rows, parts), x_TD.contiguous(), gate_up_E2HD, down_EHD, experts_N.contiguous(), *kept, hidden_NS,
        parts_NPD, rows_of_token, neurons, width, slots, parts, COLUMNS=columns_of(width, MOST_COLUMNS), num_warps=WARPS,
    )  # fmt: skip
    columns = columns_of(width, SUM_COLUMNS)
    _launch(
        sum_kernel, (tokens, triton.cdiv(width, columns)), parts_NPD, kept.counts_N, out_TD, width, parts,
        ROWS=rows_of_token, SLOTS=triton.next_power_of_2(parts), COLUMNS=columns, num_warps=SUM_WARPS,
    )  # fmt: skip
    return out_TD


def decode(
    x_ND: torch.Tensor,
    gate_up_E2HD: torch.Tensor,
    down_EHD: torch.Tensor,
    probs_N: torch.Tensor,
    tokens_E: torch.Tensor,
    k: int,
    activation: str,
    *,
    threshold: float | None = None,
) -> Decoded:
    """The experts for a few rows, sorted by expert, without gradients.

    x_ND and weights: fp32, bf16 or fp16. tokens_E: [E] int64 rows of each expert. k, threshold: as in `select_rows`. The
    gates are a grouped GEMM of torch, in the dtype of x. Torch computes it without waiting for the host in bf16 on sm_90 and
    sm_100; elsewhere it reads tokens_E on the host, so that a CUDA graph cannot capture this function.
    """
    gate_NH = expert_gemm(x_ND, gate_up_E2HD[:, 0].transpose(1, 2), tokens_E)
    rows_N = torch.arange(len(x_ND), device=x_ND.device)
    experts_N = torch.searchsorted(tokens_E.cumsum(0), rows_N, right=True, out_int32=True)
    kept = select_rows(gate_NH, probs_N, experts_N, k, activation, threshold=threshold)
    return Decoded(up_down(x_ND, gate_up_E2HD, down_EHD, experts_N, kept), kept)


def decodes(x_ND: torch.Tensor, neurons: int) -> bool:
    """Whether these kernels compute experts of so many neurons for this tensor: on a GPU, or in Triton's interpreter."""
    return x_ND.dtype in GRAIN and neurons <= MAX_NEURONS and (x_ND.is_cuda or INTERPRETED)


def _bits(threshold: float) -> int:
    """Those of fp32 as an integer, which has the order of the numbers that are not negative."""
    return struct.unpack("<i", struct.pack("<f", threshold))[0]


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if grid[0] == 0:
        return
    with contextlib.nullcontext() if INTERPRETED else torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)
