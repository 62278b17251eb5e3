"""Short fixed runs whose losses must not change: their definitions, and the record beside this file.

with distributed(ParallelConfig(), seed=1, timeout_minutes=1):
    found = {name: train(model) for name, model in RUNS.items()}
differences(found, read_record())                     # lines of a report, none if all agree
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mone_model.config import ComputeConfig, ModelConfig
from tests.tiny import TINY_MODEL, always
from train.config import OptimizerConfig, RunConfig, TrainingConfig
from train.engines.megatron import MegatronEngine
from train.runtime import Runtime, set_seeds
from train.sources import Batch

RECORD = Path(__file__).parent / "losses.json"
STEPS = 6
RTOL = 1e-4
"""Machines and versions of torch round differently."""

STRONG = {"init_std": 0.2}
"""Weights so large that the experts matter from the first step on."""
QUARTER = {"activation_ratio": 0.25, "neuron_balance_coeff": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "all neurons": {"activation_ratio": 1.0},
    "a quarter, no balance": {"activation_ratio": 0.25},
    "a quarter, normalised balance": QUARTER | {"neuron_balance_form": "normalised"},
    "a quarter, unmasked balance": QUARTER | {"neuron_balance_form": "unmasked"},
    "a quarter, masked balance": QUARTER | {"neuron_balance_form": "masked"},
    "a quarter, sparse shared expert": {"activation_ratio": 0.25, "shared_expert_neuron_ratio": 0.5},
    "a quarter, GELU": {"activation_ratio": 0.25, "activation": "gelu"},
    "sigmoid router with expert bias": {"activation_ratio": 0.25, "router_score_function": "sigmoid", "expert_bias": True},
    "router losses": {"activation_ratio": 0.25, "aux_loss_coeff": 0.1, "z_loss_coeff": 0.01},
}
"""Options of the model in each run, beside those of `TINY_MODEL`."""


def batches() -> Iterator[Batch]:
    """Micro-batches of random tokens [4, 16] whose frequencies differ, so that a few steps lower the loss."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = (64 * torch.rand(4, 17, generator=generator).square()).long()
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(4, 16),
            "position_ids": torch.arange(16).expand(4, -1),
        }


def train(model: dict[str, Any]) -> dict[str, list[float]]:
    """Loss in nats per token and gradient norm of each step; needs the groups of one process."""
    config = RunConfig(
        model=ModelConfig(**TINY_MODEL | STRONG | model),
        compute=ComputeConfig(experts="grouped"),  # not auto: the fastest may differ from run to run
        training=TrainingConfig(steps=STEPS, micro_batch_size=4, global_batch_size=8),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup_steps=2),
    )
    set_seeds(1)
    torch.set_num_threads(1)
    engine, data = MegatronEngine(config, Runtime(0, 1, torch.device("cpu"))), batches()
    steps = [engine.train_step(data, micro_batches=2, accept=always) for _ in range(STEPS)]
    return {"loss": [step.loss for step in steps], "grad_norm": [step.grad_norm for step in steps]}


def read_record() -> dict[str, dict[str, list[float]]]:
    """The recorded runs by name."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def differences(found: dict[str, dict[str, list[float]]], recorded: dict[str, dict[str, list[float]]]) -> list[str]:
    """One line for each number further than RTOL from its record, and for each run that only one side has."""
    lines = [f"{name}: {'not recorded' if name in found else 'no such run'}" for name in found.keys() ^ recorded.keys()]
    for name in found.keys() & recorded.keys():
        for metric, values in found[name].items():
            for step, (value, before) in enumerate(zip(values, recorded[name][metric], strict=True), start=1):
                if not abs(value - before) <= RTOL * abs(before):
                    lines.append(f"{name}: {metric} of step {step}: {before:.7g} -> {value:.7g} ({value / before - 1:+.1e})")
    return sorted(lines)
