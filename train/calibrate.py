"""Find gate thresholds for a trained model, which replace the top-K: a neuron is kept if its |gate| reaches the threshold.

    mone-calibrate run=runs/demo
    mone-sample run=runs/demo thresholds=runs/demo/thresholds.json

A threshold needs no comparison with the gates of other neurons. Half of the validation sequences set the thresholds. The
other half compares the loss with thresholds to the loss with top-K.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data_prep.shards import TOKENIZER_NAME, Manifest
from data_prep.tokenizer import load_tokenizer
from mone_common.console import UserError, command, to_dataclass
from mone_common.files import writing
from mone_model import megatron
from train.config import RunConfig
from train.config_sections import SourceConfig
from train.launcher import check_alone
from train.sample_order import load_manifests, plan_order
from train.trained_model import load_model, load_run_config, one_process

if TYPE_CHECKING:
    from train.data import RunData
    from train.sources import Batch


@dataclass
class CalibrateConfig:
    """Options of mone-calibrate."""

    run: str = MISSING
    """Folder of the run."""
    step: int | None = None
    """Step of the checkpoint to load; null: the newest."""
    ratio: float | None = None
    """Share of an expert's neurons to keep on average; null: the activation ratio of the run."""
    per: str = "layer"
    """layer: one threshold per layer; model: one threshold for the whole model."""
    sequences: int = 64
    """Number of validation sequences, taken from the sources in turn."""
    data: list[str] | None = None
    """Folders of token shards with the validation sequences, e.g. 'data=[shards/a,shards/b]'; null: those of the run."""
    output: str | None = None
    """File to write; null: thresholds.json in the run folder."""
    trust: bool = False
    """Also load checkpoints that contain pickled code. Loading executes that code: use only with trusted checkpoints."""

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UserError(f"ratio={self.ratio}: must be in (0, 1], or null")
        if self.per not in ("layer", "model"):
            raise UserError(f"per={self.per}: choose layer or model")
        if self.sequences < 2:
            raise UserError(f"sequences={self.sequences}: must be at least 2: half to set thresholds, half to test them")


ConfigStore.instance().store(name="calibrate_schema", node=CalibrateConfig)


@command("calibrate")
def main(hydra_config: DictConfig) -> None:
    """Write the thresholds; print the shares that they keep and the loss."""
    check_alone("train.calibrate")
    options = to_dataclass(hydra_config, CalibrateConfig)
    run = load_run_config(Path(options.run))
    score = run.model.neuron_score
    if score != "abs_gate":
        raise UserError(f"run={options.run}: model.neuron_score={score}: thresholds need abs_gate")
    output = Path(options.output or Path(options.run) / "thresholds.json")
    if output.exists() and not output.is_file():
        raise UserError(f"output={output}: is not a file; give the name of the file to write")
    if not output.parent.is_dir():
        raise UserError(f"output={output}: the folder {output.parent} does not exist")
    megatron.prepare()
    from mone_model.megatron.calibration import counting_magnitudes, select_by_threshold
    from mone_model.thresholds import find_thresholds, shares_reaching
    from train.data import load_data

    with one_process(run):
        manifests = find_manifests(run, options)
        data = load_data(run, manifests, plan_order(run, manifests, None, 0), samples=1)
        setting, held_out = (list(validation_sequences(data, start, options.sequences // 2)) for start in (0, 1))
        if not held_out:
            raise UserError(f"sequences={options.sequences}: needs two of one source; the data of the run has fewer")
        model = load_model(run, step=options.step, trust=options.trust)
        ratio = options.ratio if options.ratio is not None else run.model.activation_ratio
        by_layer = run.model.layer_activation_ratios if options.ratio is None and options.per == "layer" else None
        with counting_magnitudes(model) as counts_LM:
            mean_loss(model, setting)
        thresholds_L = find_thresholds(counts_LM, ratio=by_layer or ratio, per=options.per)
        with counting_magnitudes(model) as counts_LM:
            exact = mean_loss(model, held_out)
        shares_L = shares_reaching(counts_LM, thresholds_L)
        select_by_threshold(model, thresholds_L)
        loss = mean_loss(model, held_out)
    with writing(output) as temporary:
        written = {"thresholds": thresholds_L, "ratio": ratio, "per": options.per, "loss": loss, "loss_of_k_best": exact}
        temporary.write_text(json.dumps(written, indent=1) + "\n")
    print(f"keeping {ratio:.1%} of the neurons on average; on {len(held_out)} held-out sequences:")
    print("  layer  threshold   kept")
    for layer, (threshold, share) in enumerate(zip(thresholds_L, shares_L, strict=True)):
        print(f"  {layer:5} {threshold:10.4g}  {share:5.1%}")
    kept = f"the {run.model.describe_active_neurons()} best" if run.model.activation_ratio < 1 else "all neurons"
    print(f"loss {loss:.4f} nats per token, with {kept} of each token {exact:.4f}")
    print(f"written: {output}")


def find_manifests(run: RunConfig, options: CalibrateConfig) -> list[Manifest]:
    """Manifests of the calibration data; UserError if they are missing, or their tokenizer is not that of the run."""
    if options.data is not None:
        run.data.blend = [SourceConfig(path=path) for path in options.data]
    run.evaluation.text = []  # not read here
    if not run.data.blend:
        raise UserError(f"data={options.data}: name at least one folder of token shards")
    try:
        manifests = load_manifests(run)
    except ValueError as error:
        how = "" if options.data is not None else ". Calibrate on other shards of the same tokenizer with data=[FOLDER]"
        raise UserError(f"{error}{how}") from error
    kept = Path(options.run) / TOKENIZER_NAME
    if kept.is_dir() and load_tokenizer(kept).sha256 != manifests[0].tokenizer_sha256:
        raise UserError(f"data: {manifests[0].folder} was tokenized with another tokenizer than {kept}, that of the run")
    return manifests


def validation_sequences(data: "RunData", start: int, count: int) -> Iterator["Batch"]:
    """Every second validation sequence of the sources in turn, starting at index `start`; tensors of shape [1, s]."""
    longest = max(map(len, data.validation.values()), default=0)
    places = ((source, i) for i in range(start, longest, 2) for source in data.validation.values() if i < len(source))
    for source, i in itertools.islice(places, count):
        yield {name: tensor[None] for name, tensor in source[i].items()}


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches: list["Batch"]) -> float:
    """Mean cross-entropy in nats per token."""
    total = tokens = 0.0
    for batch in batches:
        loss_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        total += float((loss_BS * batch["loss_mask"]).sum())
        tokens += float(batch["loss_mask"].sum())
    return total / tokens


if __name__ == "__main__":
    main()
