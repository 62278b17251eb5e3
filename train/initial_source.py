"""Initial weights from elsewhere (`init.source`): check that they fit the run, then open them; and branches of runs.

check_source(config)                                   # in the preparation: no collectives; ValueError
source, noted = open_source(config, device)            # a collective on every rank

check_branch(config, manifests)                        # with init.branch: the checkpoints to continue from
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.shards import Manifest
from mone_common.checkpoint_folder import Checkpoint
from mone_common.console import UserError
from mone_model.config import CHANGEABLE
from mone_model.hf.imported_model import ImportedModel, differences, find_model
from train.checkpoint_facts import read_facts
from train.config import RunConfig
from train.continuation import check_continues, report_problems

if TYPE_CHECKING:
    import torch

    from mone_model.weight_sources import WeightSource


def check_source(config: RunConfig) -> ImportedModel:
    """The model of `init.source`; ValueError, with all fields that differ, if the run's model cannot use its weights."""
    init, model = config.init, config.model
    assert init.source is not None
    try:
        imported = find_model(Path(init.source), step=init.step)
    except UserError as error:
        raise UserError(f"init.source={error}") from error
    found = differences(model, imported.model, upcycle=init.upcycle)
    refused = {name: values for name, values in found.items() if name not in init.change}
    if refused:
        listed = ", ".join(f"model.{name}={ours} (source: {theirs})" for name, (ours, theirs) in refused.items())
        how = [f"`mone-import source={init.source}` prints the options that fit"]
        if changeable := [name for name in CHANGEABLE if name in refused]:
            how.append(f"init.change=[{','.join(changeable)}] allows what changes no tensor")
        if imported.model.num_experts == 1 and model.num_experts > 1 and not init.upcycle:
            how.append("init.upcycle=true makes experts of a dense model")
        raise UserError(f"init.source={init.source}: does not fit: {listed}; {'; '.join(how)}")
    if init.upcycle:
        from mone_model.upcycling import check_upcycles

        check_upcycles(model, imported.model, splits=init.upcycle_splits)
    return imported


TIED = ("seq_length", "vocab_multiple", "neuron_bias")
"""Fields of the model that a branch cannot change: its data are counted in sequences, and its optimizer state has the
tensors of the source."""


def check_branch(config: RunConfig, manifests: list[Manifest]) -> list[Checkpoint]:
    """The checkpoints that `init.branch` can continue from, oldest first; ValueError if the run cannot branch off them."""
    source = f"init.source={config.init.source}"
    imported = check_source(config)
    if imported.folder is not None:
        raise UserError(f"init.branch=true: {source} is a {imported.format} model, which has no optimizer state; give a run")
    newest = imported.checkpoints[-1]
    facts, ours = read_facts(newest), vars(config.model) | {"precision": config.compute.precision}
    theirs = vars(imported.model) | {"precision": facts.precision}
    for name in (*TIED, "precision"):
        if ours[name] != theirs[name]:
            option = "compute.precision" if name == "precision" else f"model.{name}"
            raise UserError(f"{option}={ours[name]}: a branch of {newest.path} needs {option}={theirs[name]}, as its source")
    if newest.step >= config.training.steps:
        raise UserError(
            f"training.steps={config.training.steps}: {newest.path} is already at step {newest.step}; a branch counts from "
            "the start of its source"
        )
    check_continues(config, manifests, newest, branch=True)
    report_problems(imported.problems)
    return imported.checkpoints


def open_source(config: RunConfig, device: "torch.device") -> tuple["WeightSource", dict[str, Any]]:
    """The initial weights, and what is recorded of them; a collective on every rank. UserError if they are damaged.

    device: draws the random numbers of upcycling.
    """
    from mone_model.hf.sources import open_weights
    from mone_model.upcycling import UpcycledWeights
    from train.checkpoint_integrity import newest_intact

    init = config.init
    imported = check_source(config)
    checkpoint = None
    if imported.folder is None:
        checkpoint, problems = newest_intact(imported.checkpoints, trust=config.checkpoint.trust)
        if checkpoint is None:
            raise UserError(f"init.source={init.source}: {'; '.join(problems)}")
        report_problems(imported.problems + problems)
    source = open_weights(imported, config.model, checkpoint=checkpoint)
    if init.upcycle:
        source = UpcycledWeights(
            source,
            config.model,
            splits=init.upcycle_splits,
            noise=init.upcycle_noise,
            seed=config.run.seed,
            device=device,
        )
    if checkpoint is not None:
        return source, note_checkpoint(config, checkpoint)
    return source, _note(config, imported.path, imported.format)


def note_checkpoint(config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What is recorded of a checkpoint that a new run starts from."""
    before = {"step": checkpoint.step, "run": checkpoint.noted.get("run"), "initial": checkpoint.noted.get("initial")}
    return _note(config, checkpoint.path, "checkpoint") | before


def _note(config: RunConfig, path: Path, kind: str) -> dict[str, Any]:
    init = config.init
    return {
        "source": str(path.resolve()),
        "format": kind,
        "branch": init.branch,
        "upcycle": init.upcycle,
        "upcycle_splits": init.upcycle_splits,
        "upcycle_noise": init.upcycle_noise,
    }


def describe_initial(noted: dict[str, Any]) -> str:
    """What a run prints about its initial weights."""
    text = f"init      weights of {noted['source']} ({noted['format']})"
    if noted["upcycle"]:
        splits, noise = noted["upcycle_splits"], noted["upcycle_noise"]
        text += f", upcycled: each copy of the MLP is {splits} expert{'s' if splits > 1 else ''}; noise {noise:g}"
    return text
