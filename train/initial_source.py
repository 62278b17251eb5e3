"""Initial weights from elsewhere (`init.source`): check that they fit the run, then open them.

check_source(config)                                   # in the preparation: no collectives; ValueError
source, noted = open_source(config, device)            # a collective on every rank
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_common.console import UserError
from mone_model.config import CHANGEABLE
from mone_model.hf.imported_model import ImportedModel, differences, find_model
from train.config import RunConfig
from train.continuation import report_problems

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
        report_problems(problems)
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
    noted: dict[str, Any] = {
        "source": str((imported.path if checkpoint is None else checkpoint.path).resolve()),
        "format": imported.format,
        "upcycle": init.upcycle,
        "upcycle_splits": init.upcycle_splits,
        "upcycle_noise": init.upcycle_noise,
    }
    if checkpoint is not None:
        noted |= {"step": checkpoint.step, "run": checkpoint.noted.get("run"), "initial": checkpoint.noted.get("initial")}
    return source, noted


def describe_initial(noted: dict[str, Any]) -> str:
    """What a run prints about its initial weights."""
    text = f"init      weights of {noted['source']} ({noted['format']})"
    if noted["upcycle"]:
        splits, noise = noted["upcycle_splits"], noted["upcycle_noise"]
        text += f", upcycled: each copy of the MLP is {splits} expert{'s' if splits > 1 else ''}; noise {noise:g}"
    return text
