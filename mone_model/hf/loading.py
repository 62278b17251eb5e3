"""Load a trained model in three lines, in one process without process groups.

from mone_model.hf import load

model, tokenizer = load("runs/demo")         # a run, one of its checkpoints, or an exported folder
model.generate(**tokenizer("The city of", return_tensors="pt"))
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from mone_common.checkpoint_folder import Checkpoint
from mone_common.console import UserError
from mone_model.hf.checkpoint import CheckpointWeights, find_checkpoint, model_of
from mone_model.hf.configuration_mone import MoneConfig
from mone_model.hf.conversion import Conversion
from mone_model.hf.formats import config_of
from mone_model.hf.modeling_mone import MoneForCausalLM
from mone_model.hf.tokenizer import write_tokenizer

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    thresholds_L: list[float] | None = None,
    trust: bool = False,
) -> tuple[Any, Any]:
    """The model in evaluation mode, and its tokenizer (None if there is none).

    path: a run folder, a checkpoint, or an exported folder of any class of transformers. step: of the checkpoint; None: the
    newest that is intact. dtype: None for that of the weights. thresholds_L: one for each layer, in place of the K best.
    trust: also read checkpoints that contain pickled code, which reading executes.

    A `MoneForCausalLM` computes its experts by this project's backends: `set_experts_implementation` changes that.
    Raises UserError if there is no model, or it cannot be loaded.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        model, tokenizer = _load_exported(folder, dtype)
        if thresholds_L is not None:
            raise UserError(f"{folder}: an exported model has its thresholds in config.json; export it with thresholds=FILE")
    else:
        checkpoint = find_checkpoint(folder, step=step, trust=trust, warn=logger.warning)
        tokenizer = _load_tokenizer(checkpoint)
        model = _load_checkpoint(checkpoint, dtype, thresholds_L, None if tokenizer is None else tokenizer.eos_token_id)
    if isinstance(model, MoneForCausalLM):
        model.set_experts_implementation("mone")
    return model.eval(), tokenizer


def _load_exported(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else dtype)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        return model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: transformers cannot load it ({' '.join(str(error).split())})") from error


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    folder = checkpoint.path.parent.parent / "tokenizer"
    if not folder.is_dir():
        return None
    with tempfile.TemporaryDirectory() as converted:
        write_tokenizer(folder, Path(converted), context=model_of(checkpoint).seq_length)
        return AutoTokenizer.from_pretrained(converted)


def _load_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype | None, thresholds_L: list[float] | None, end: int | None
) -> Any:
    ours = model_of(checkpoint)
    conversion = Conversion(CheckpointWeights(checkpoint), ours, "mone")
    dtype = dtype or conversion.dtype(conversion.tensors[0])
    name = str(dtype).removeprefix("torch.")
    config = MoneConfig(**config_of(ours, "mone", end=end, dtype=name, thresholds_L=thresholds_L))
    state = {tensor.name: conversion.read(tensor) for tensor in conversion.tensors}
    return MoneForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
