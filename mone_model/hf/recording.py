"""Which neurons fire for which token.

    with record_neurons(model) as record:
        model(**tokenizer("The city of", return_tensors="pt"))
    record[0].experts_Tk         # layer 0: the experts of each token
    record[0].kept_TkH           # in each of them, which neurons were kept

Shapes: T tokens (batch and positions, flattened), k experts of a token, H neurons of an expert, D width.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from mone_common.checks import check
from mone_model.hf.modeling_mone import MoneExperts, select_neurons


@dataclass
class LayerRecord:
    """What the experts of one layer did, for all tokens since the recording began; on the CPU."""

    experts_Tk: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    """Experts of each token, in the order of their routing weights."""
    weights_Tk: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """Their routing weights."""
    gates_TkH: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    """act(gate) of every neuron, kept or not, fp32."""
    kept_TkH: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.bool))
    """Whether the neuron was kept."""


@contextlib.contextmanager
def record_neurons(model: torch.nn.Module) -> Iterator[list[LayerRecord]]:
    """Record, for each layer, the experts, neurons and gates of every token that passes inside the block.

    model: a `MoneForCausalLM` or `MoneModel`, with any experts implementation. The gates are computed a second time, and
    T * k * H numbers of each layer are held: record prompts, not corpora. Raises ValueError for other models.
    """
    found = [module for module in model.modules() if _is_mone(module)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no MoneExperts: load it with mone_model.hf.load, or export it as mone")
    records = [LayerRecord() for _ in found]
    with contextlib.ExitStack() as hooks:
        for experts, record in zip(found, records, strict=True):
            hooks.callback(experts.register_forward_pre_hook(functools.partial(_record, record)).remove)
        yield records


def _is_mone(module: torch.nn.Module) -> bool:
    # By name, since trust_remote_code makes a class of its own from the same file.
    return isinstance(module, MoneExperts) or type(module).__name__ == MoneExperts.__name__


@torch.no_grad()
def _record(record: LayerRecord, experts: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    x_TD, experts_Tk, weights_Tk = inputs
    neurons = experts.intermediate_dim
    gates_TkH = torch.empty(*experts_Tk.shape, neurons, dtype=torch.float32, device=x_TD.device)
    for expert in experts_Tk.unique().tolist():
        token, slot = torch.where(experts_Tk == expert)
        gate = torch.nn.functional.linear(x_TD[token], experts.gate_up_proj[expert, :neurons])
        gates_TkH[token, slot] = experts.act_fn(gate.float())
    check(experts.score == "abs_gate", "neuron_score", experts.score, "only neurons kept by abs_gate can be recorded")
    bias_TkH = None if experts.neuron_bias is None else experts.neuron_bias[experts_Tk]
    kept_TkH = select_neurons(gates_TkH, experts.k, experts.threshold, bias_TkH)
    for name, new in (
        ("experts_Tk", experts_Tk),
        ("weights_Tk", weights_Tk.float()),
        ("gates_TkH", gates_TkH),
        ("kept_TkH", kept_TkH),
    ):
        before = getattr(record, name)
        setattr(record, name, torch.cat([before, new.cpu()]) if before.numel() else new.cpu())
