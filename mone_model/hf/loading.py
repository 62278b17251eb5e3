"""Load a trained model in three lines, in one process without process groups.

from mone_model.hf import load

model, tokenizer = load("runs/demo")         # a run, one of its checkpoints, or an exported folder
model.generate(**tokenizer("The city of", return_tensors="pt"))
"""

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mone_common.checkpoint_folder import Checkpoint
from mone_common.console import UserError
from mone_model.config import ModelConfig
from mone_model.hf.checkpoint import CheckpointWeights, find_checkpoint, model_of
from mone_model.hf.configuration_mone import MoneConfig
from mone_model.hf.conversion import Conversion
from mone_model.hf.formats import config_of, why_not
from mone_model.hf.modeling_mone import MoneForCausalLM
from mone_model.hf.tokenizer import write_tokenizer

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    activation_ratio: float | None = None,
    thresholds_L: list[float] | None = None,
    trust: bool = False,
) -> tuple[Any, Any]:
    """The model in evaluation mode, and its tokenizer (None if there is none).

    path: a run folder, a checkpoint, or an exported folder of any class of transformers. step: of the checkpoint; None: the
    newest that is intact. dtype: None for that of the weights. activation_ratio: share of an expert's neurons to keep; None:
    that of the model. thresholds_L: one for each layer, in place of the K best. trust: also read checkpoints that contain
    pickled code, which reading executes.

    A `MoneForCausalLM` computes its experts by this project's backends: `set_experts_implementation` changes that.
    Raises UserError if there is no model, or it cannot be loaded.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        changes: dict[str, Any] = {} if thresholds_L is None else {"neuron_thresholds": thresholds_L}
        if activation_ratio is not None:
            changes |= {"activation_ratio": activation_ratio, "layer_activation_ratios": None}
        model, tokenizer = _load_exported(folder, dtype, changes)
    else:
        checkpoint = find_checkpoint(folder, step=step, trust=trust, warn=logger.warning)
        tokenizer = _load_tokenizer(checkpoint)
        ours = _change(model_of(checkpoint), folder, activation_ratio, thresholds_L)
        end = None if tokenizer is None else tokenizer.eos_token_id
        model = _load_checkpoint(checkpoint, ours, dtype, thresholds_L, end)
    if isinstance(model, MoneForCausalLM):
        model.set_experts_implementation("mone")
    return model.eval(), tokenizer


def _load_exported(folder: Path, dtype: torch.dtype | None, changes: dict[str, Any]) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(folder)
        if changes and not isinstance(config, MoneConfig):
            raise UserError(f"{folder}: {type(config).__name__} cannot select neurons ({', '.join(changes)})")
        if changes:  # checks them
            config = MoneConfig(**config.to_dict() | changes)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto" if dtype is None else dtype)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        return model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: transformers cannot load it ({' '.join(str(error).split())})") from error


def _change(
    model: ModelConfig, folder: Path, activation_ratio: float | None, thresholds_L: list[float] | None
) -> ModelConfig:
    """The model with another ratio; UserError for a change that it does not fit."""
    if model.expert_capacity_factor is not None:
        logger.warning(
            f"{folder}: model.expert_capacity_factor={model.expert_capacity_factor}: tokens were dropped in training; "
            "the loaded model drops none"
        )
    try:
        model = dataclasses.replace(model, expert_capacity_factor=None)
        if activation_ratio is not None:
            model = dataclasses.replace(model, activation_ratio=activation_ratio, layer_activation_ratios=None)
    except ValueError as error:
        raise UserError(str(error)) from error
    if obstacles := why_not(model, "mone", thresholds_L):
        raise UserError(f"{folder}: {'; '.join(obstacles)}")
    return model


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    folder = checkpoint.path.parent.parent / "tokenizer"
    if not folder.is_dir():
        return None
    with tempfile.TemporaryDirectory() as converted:
        write_tokenizer(folder, Path(converted), context=model_of(checkpoint).seq_length)
        return AutoTokenizer.from_pretrained(converted)


def _load_checkpoint(
    checkpoint: Checkpoint,
    ours: ModelConfig,
    dtype: torch.dtype | None,
    thresholds_L: list[float] | None,
    end: int | None,
) -> Any:
    conversion = Conversion(CheckpointWeights(checkpoint), ours, "mone")
    dtype = dtype or conversion.dtype(conversion.tensors[0])
    name = str(dtype).removeprefix("torch.")
    config = MoneConfig(**config_of(ours, "mone", end=end, dtype=name, thresholds_L=thresholds_L))
    state = {tensor.name: conversion.read(tensor) for tensor in conversion.tensors}
    model = MoneForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.config.name_or_path = str(checkpoint.path)
    return model
