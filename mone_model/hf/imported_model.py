"""A model to take weights from: a Hugging Face folder, one of our runs, or one of our checkpoints.

imported = find_model(Path("models/qwen"))          # UserError if the folder is none of them, or cannot be expressed
imported.model                                      # ModelConfig
differences(config.model, imported.model)           # fields that forbid to use its weights
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from mone_common.checkpoint_folder import MANIFEST, Checkpoint, list_checkpoints, read_manifest
from mone_common.console import UserError
from mone_common.run_records import read_published
from mone_model.config import ModelConfig
from mone_model.hf.model_folder import ModelFolder

FREE = {
    "activation_ratio",
    "layer_activation_ratios",
    "activation_ratio_schedule",
    "activation_ratio_curve",
    "shared_expert_neuron_ratio",
    "seq_length",
    "vocab_multiple",
    "hidden_dropout",
    "attention_dropout",
    "init_std",
    "aux_loss_coeff",
    "seq_aux_loss_coeff",
    "global_aux_loss_coeff",
    "z_loss_coeff",
    "expert_bias_update_rate",
    "expert_capacity_factor",
    "neuron_balance_coeff",
    "neuron_balance_form",
    "neuron_balance_stride",
    "neuron_bias_update_rate",
}
"""Fields that may differ from the source: they change no tensor, and are choices of the training."""
UPCYCLED = {
    "num_experts",
    "moe_ffn_hidden_size",
    "shared_expert_ffn_hidden_size",
    "router_topk",
    "router_score_function",
    "router_pre_softmax",
    "router_scaling_factor",
    "expert_bias",
    "neuron_bias",
}
"""Fields that upcycling sets; `mone_model.upcycling.check_upcycles` checks them."""


class ImportedModel(NamedTuple):
    """A model, and where its weights are."""

    path: Path
    format: str
    """model_type of a Hugging Face folder, or `checkpoint`."""
    model: ModelConfig
    folder: ModelFolder | None
    checkpoints: list[Checkpoint]
    """Of a run: those to choose from, oldest first. Their content has not been verified."""
    problems: list[str] = []
    """Checkpoints of the run that cannot be read."""


def find_model(path: Path, *, step: int | None = None) -> ImportedModel:
    """The model in a folder; step: of the checkpoint of a run, None: the newest. UserError if there is none."""
    if (path / "checkpoints").is_dir() or (path / MANIFEST).is_file():
        checkpoints, problems = list_saved(path, step=step)
        of_run = _model_of_run(checkpoints[-1])
        same = [each for each in checkpoints if _model_of_run(each) == of_run]
        return ImportedModel(path, "checkpoint", of_run.at_step(checkpoints[-1].step), None, same, problems)
    if step is not None:
        raise UserError(f"{path}: has no checkpoints, of which step={step} could be one")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{path}: not a model: has no config.json (Hugging Face), checkpoints (a run) or {MANIFEST}")
    folder = ModelFolder(path)
    return ImportedModel(path, folder.format, folder.model, folder, [])


def list_saved(folder: Path, *, step: int | None = None) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints of a run, oldest first, or the one that `folder` is; and the problems of others in it.

    step: only this one. UserError if there is none. Their content is not verified.
    """
    if not (folder / "checkpoints").is_dir():
        try:
            checkpoint = read_manifest(folder)
        except ValueError as error:
            what = f"neither a run with checkpoints nor a checkpoint ({error})" if folder.is_dir() else "does not exist"
            raise UserError(f"{folder}: {what}; give the folder of a run, such as runs/demo") from error
        if step not in (None, checkpoint.step):
            raise UserError(f"{folder}: is the checkpoint of step {checkpoint.step}, not of step={step}")
        return [checkpoint], []
    found, problems = list_checkpoints(folder / "checkpoints", run=read_published(folder).get("run"))
    asked = [checkpoint for checkpoint in found if step in (None, checkpoint.step)]
    if not asked:
        steps = [checkpoint.step for checkpoint in found]
        also = "".join(f"; {problem}" for problem in problems)
        which = "has no checkpoint" if step is None else f"has no checkpoint of step={step}"
        raise UserError(f"{folder}: {which}; it has steps {steps or 'none'}{also}")
    return asked, problems


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    """The model of the run that wrote a checkpoint, at its step; UserError if it is missing or invalid."""
    return _model_of_run(checkpoint).at_step(checkpoint.step)


def _model_of_run(checkpoint: Checkpoint) -> ModelConfig:
    """The `model` section, with the schedule of the ratio."""
    noted = checkpoint.noted.get("model")
    try:
        if not isinstance(noted, dict):
            raise ValueError("its manifest has no model section")
        model = ModelConfig(**noted)
        _ = model.padded_vocab_size
    except (TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: not a model of this version ({error})") from error
    return model


def differences(ours: ModelConfig, theirs: ModelConfig, *, upcycle: bool = False) -> dict[str, tuple[Any, Any]]:
    """Fields that differ although both models should compute the same with the same weights: our value and theirs."""
    skipped = FREE | (UPCYCLED if upcycle else set())
    if ours.neuron_bias and not theirs.neuron_bias:
        skipped = skipped | {"neuron_bias"}  # it starts at 0
    a, b = _meaning(ours), _meaning(theirs)
    return {name: (a[name], b[name]) for name in a if name not in skipped and a[name] != b[name]}


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """The fields with one value for what has several spellings."""
    fields = dataclasses.asdict(model)
    fields |= {
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.head_size,
        "router_scaling_factor": model.router_scaling_factor or 1.0,
        "router_pre_softmax": model.router_pre_softmax and model.router_score_function == "softmax",
    }
    if not model.qk_layernorm:
        fields["qk_layernorm_scope"] = None
    return fields
