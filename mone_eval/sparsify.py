"""How many neurons of a model's experts are needed: losses against the share of neurons kept, without training.

    mone-sparsify model=models/mixtral text='wiki/*.jsonl' output=study
    mone-sparsify model=models/mixtral text='wiki/*.jsonl' output=study --plan           # memory and time, no layer loaded

Works for every mixture of experts of transformers with gated experts, for dense models with gated layers, and for runs of
this project. Every layer is loaded once, so a model larger than memory can be studied.
"""

import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data_prep.corpora import CorpusConfig
from data_prep.errors import DataError
from mone_common.console import UserError, command, to_dataclass
from mone_common.files import publish, temporary, writing
from mone_common.locks import LOCK_FILE, lock
from mone_common.text import clock
from mone_eval.models import DTYPES, check_model, check_tokens, context_of, find_device

if TYPE_CHECKING:
    from mone_eval.layerwise import LayerwiseModel
    from mone_eval.sparsity_study import Study, Text

logger = logging.getLogger(__name__)

STATE = "state.pt"
"""File in the unfinished folder from which a study continues."""


@dataclass
class SparsifyConfig:
    """Options of mone-sparsify."""

    model: str = MISSING
    """Folder of a model of transformers, of a run, of a checkpoint, or of an exported model."""
    text: Any = field(default=MISSING, metadata={"kind": str | list[str]})
    """Text: a file, a folder, a glob or a list of these; or folders of token shards, whose validation text is read."""
    output: str = MISSING
    """Folder to write; it must not exist."""
    ratios: list[float] = field(default_factory=lambda: [1, 0.75, 0.5, 0.4, 0.25, 0.1])
    """Shares of an expert's neurons to keep."""
    select: list[str] = field(default_factory=lambda: ["exact", "threshold"])
    """exact: the K best of each token in each expert; threshold: all that reach a threshold set on other documents."""
    per: str = "layer"
    """layer: one threshold per layer; model: one threshold for the whole model, for which the weights are read twice."""
    thresholds_from: str = "stream"
    """Hidden states of which the calibration text sets the thresholds of a layer: of the model with the thresholds of the
    layers before (stream), so that the share is kept; or of the model with all neurons (all). Used with per=layer."""
    controls: list[str] = field(default_factory=list)
    """Other ways to choose as many neurons: abs_gate_up (|act(gate) * up|), preactivation (|gate|), random (fresh for each
    token), static (those that calibration text uses most)."""
    parts: list[str] | None = None
    """Where neurons are selected, each on its own: routed, shared or dense; null: routed experts, or the gated layers of a
    dense model."""
    tasks: list[str] = field(default_factory=list)
    """Also score these tasks of lm-evaluation-harness, such as arc_easy and hellaswag; needs the extra `eval`."""
    task_data: str | None = None
    """Folder of python -m mone_eval.fetch_task_data with the data of tasks; null: the Hugging Face hub."""
    limit: int | None = None
    """Only the first questions of each task; null: all."""
    max_tokens: int = 65536
    """Tokens of text to score; whole documents in order."""
    calibration_share: float = 0.25
    """Share of the documents that set thresholds and are not scored."""
    window: int = 1024
    """Tokens that the model reads at a time; a longer document is cut into windows without overlap."""
    batch_tokens: int = 4096
    """Tokens in one call of a layer."""
    dtype: str = "auto"
    """Data type of the computation: auto (that of the weights), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1."""
    seed: int = 0
    """Seed of random neurons and of the intervals."""
    save_minutes: float = 5.0
    """Minutes between saves, from which a killed study continues; 0: after each layer."""
    plan: bool = False
    """Print memory, disk traffic and time, and end; --plan does the same."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("select", ["exact", "threshold"]),
            ("controls", ["abs_gate_up", "preactivation", "random", "static"]),
            ("parts", ["routed", "shared", "dense"]),
        ):
            for value in getattr(self, name) or ():
                if value not in choices:
                    raise UserError(f"{name}={value}: choose from {', '.join(choices)}")
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise UserError(f"ratios={self.ratios}: {ratio:g} must be above 0 and at most 1")
        for name, right, does in (
            ("ratios", len(set(self.ratios)) == len(self.ratios) > 0, "must be different numbers, at least one"),
            ("select", bool(self.select), "choose exact, threshold or both"),
            ("per", self.per in ("layer", "model"), "choose layer or model"),
            ("thresholds_from", self.thresholds_from in ("stream", "all"), "choose stream or all"),
            ("limit", self.limit is None or self.limit >= 1, "must be at least 1"),
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("calibration_share", 0 < self.calibration_share < 1, "must be above 0 and below 1"),
            ("window", self.window >= 2, "must be at least 2"),
            ("batch_tokens", self.batch_tokens >= 1, "must be at least 1"),
            ("dtype", self.dtype in DTYPES, f"choose from {', '.join(DTYPES)}"),
            ("save_minutes", self.save_minutes >= 0, "must be at least 0"),
        ):
            if not right:
                raise UserError(f"{name}={getattr(self, name)}: {does}")


ConfigStore.instance().store(name="sparsify_schema", node=SparsifyConfig)


def main() -> None:
    """Run the command; `--plan` is short for plan=true."""
    sys.argv[1:] = ["plan=true" if argument == "--plan" else argument for argument in sys.argv[1:]]
    study_model()


@command("sparsify")
def study_model(hydra_config: DictConfig) -> None:
    """Study a model, and write the results to a folder."""
    options = to_dataclass(hydra_config, SparsifyConfig)
    output = Path(options.output)
    if os.path.lexists(output):
        raise UserError(f"output={output}: exists; give another folder or remove it")
    check_model(options.model, step=None)
    device = find_device(options.device)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    from mone_eval.sparsity_plan import describe_plan, plan_of
    from mone_eval.sparsity_results import console_table, publish_results

    prepared = None
    if options.tasks:
        from mone_eval.tasks import prepare_tasks

        prepared = prepare_tasks(options.tasks, task_data=options.task_data)
    model, tokenizer = open_layerwise(options, device)
    tasks = None
    if prepared is not None:
        from mone_eval.sparsity_tasks import StreamedTasks

        tasks = StreamedTasks(prepared, model, tokenizer, limit=options.limit, batch_tokens=options.batch_tokens)
    study = prepare(options, model, tokenizer, [tasks.text] if tasks else [])
    print(describe_plan(plan_of(study)), flush=True)
    if options.plan:
        return
    unfinished = temporary(output)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with open(unfinished / LOCK_FILE, "w") as file:
            if not lock(file):
                raise UserError(f"output={output}: another process writes it")
            seconds = run(study, unfinished / STATE, identity=identity_of(options, study), every=60 * options.save_minutes)
            result = publish_results(study, unfinished, dataclasses.asdict(options), seconds, tasks)
            (unfinished / STATE).unlink(missing_ok=True)
            (unfinished / LOCK_FILE).unlink()
            publish(output, unfinished)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written ({error.strerror or error})") from error
    print(console_table(result))
    print(f"written: {output}, its report is {output}/index.html")


def open_layerwise(options: SparsifyConfig, device: torch.device) -> tuple["LayerwiseModel", Any]:
    """The model, whose layers are loaded when they are needed, and its tokenizer."""
    from transformers import AutoTokenizer

    from mone_eval.layerwise import LayerwiseModel
    from mone_model.hf import load

    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    folder = Path(options.model)
    if (folder / "config.json").is_file():
        return LayerwiseModel(folder, dtype=dtype, device=device), AutoTokenizer.from_pretrained(folder)
    try:
        model, tokenizer = load(folder, dtype=dtype)
    except UserError as error:
        raise UserError(f"model={error}") from error
    return LayerwiseModel(model, device=device), tokenizer


def prepare(options: SparsifyConfig, model: "LayerwiseModel", tokenizer: Any, more: list["Text"]) -> "Study":
    """The study before its first layer; UserError if the model or the text does not fit the options.

    more: other texts to score.
    """
    from mone_eval.expert_hooks import hook_experts, main_part
    from mone_eval.sparsity_streams import streams_of
    from mone_eval.sparsity_study import Study

    try:
        hooked = hook_experts(model.model)
    except UserError as error:
        raise UserError(f"model={options.model}: {error}") from error
    present = sorted({experts.part for experts in hooked})
    if not present:
        kind = type(model.model).__name__
        raise UserError(f"model={options.model}: {kind} has no gated experts and no gated layers to select neurons in")
    parts = options.parts or [main_part(hooked)]
    for part in parts:
        if part not in present:
            raise UserError(f"parts={parts}: the model has no {part} experts; it has {', '.join(present)}")
    streams = streams_of(
        parts=parts,
        ratios=sorted(options.ratios, reverse=True),
        select=options.select,
        controls=options.controls,
        trained=any(experts.trained is not None for experts in hooked),
    )
    scored, calibration = read_text(options, model, tokenizer)
    return Study(
        model,
        hooked,
        streams,
        [scored, *more],
        calibration,
        per=options.per,
        thresholds_from=options.thresholds_from,
        seed=options.seed,
    )


def read_text(options: SparsifyConfig, model: "LayerwiseModel", tokenizer: Any) -> tuple["Text", "Text"]:
    """The text to score and the text that sets thresholds; no document is in both."""
    from mone_eval.documents import encode, read_texts
    from mone_eval.sparsity_study import Text
    from mone_eval.text import beginning_of
    from mone_eval.windows import cut

    begin = beginning_of(tokenizer)
    window = min(options.window, context_of(model.model.config) or options.window)
    documents, tokens = [], 0
    wanted = options.max_tokens / (1 - options.calibration_share)
    try:
        for document in encode(read_texts(CorpusConfig(path=options.text)), tokenizer):
            if len(document.tokens) + (begin is not None) >= 2:
                documents.append(document)
                tokens += len(document.tokens)
            if tokens >= wanted and len(documents) >= 2:
                break
    except DataError as error:
        raise UserError(str(error).replace("corpus.path=", "text=")) from error
    check_tokens(documents, model.model, options.model)
    # Spread over the text: document i sets thresholds if the share of such documents would fall behind without it.
    share = options.calibration_share
    sets = [int((number + 1) * share) > int(number * share) for number in range(len(documents))]
    if not any(sets) and len(documents) >= 2:
        sets[-1] = True
    to_score, to_calibrate = (
        [each for each, its in zip(documents, sets, strict=True) if its is kind] for kind in (False, True)
    )
    if not to_score or not to_calibrate:
        raise UserError(
            f"text={options.text}: has {len(documents)} documents of 2 tokens or more; needs at least two, "
            "one to set thresholds and one to score"
        )
    scored, calibration = (
        Text(those, cut(those, window=window, stride=window, begin=begin), begin) for those in (to_score, to_calibrate)
    )
    return scored.split(options.batch_tokens), calibration.split(options.batch_tokens)


def identity_of(options: SparsifyConfig, study: "Study") -> str:
    """What a study must share with a saved state to continue from it: options, text and weights."""
    from mone_eval.documents import checksum

    kept = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("plan", "save_minutes")}
    files = [path for path in sorted(Path(options.model).rglob("*.safetensors")) if path.is_file()]
    stats = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    text = [checksum(text.documents) for text in (study.texts[0], study.calibration)]
    return hashlib.sha256(json.dumps([kept, stats, text], default=str).encode()).hexdigest()


def run(study: "Study", path: Path, *, identity: str, every: float) -> float:
    """Pass the text through all layers, and save the state after a layer when `every` seconds have passed.

    Returns the seconds that it took, those of earlier attempts included.
    """
    before = 0.0
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        if saved["identity"] == identity:
            study.restore(saved["study"])
            before = saved["seconds"]
            logger.info(f"continuing after layer {study.layers_done} of {len(study.model.layers)}")
        else:
            logger.info(f"{path.parent}: is of a study with other options, text or weights; starting from the first layer")
    begin = reported = saved_at = time.monotonic()
    first = study.layers_done
    study.calibrate_model()
    while not study.done:
        study.advance()
        now = time.monotonic()
        left = (now - begin) / (study.layers_done - first) * (len(study.model.layers) - study.layers_done)
        if now - reported >= REPORT_SECONDS or study.done:
            logger.info(f"layer {study.layers_done} of {len(study.model.layers)}, {clock(left)} left")
            reported = now
        if now - saved_at >= every and not study.done:
            with writing(path) as file:
                torch.save({"identity": identity, "seconds": before + now - begin, "study": study.state()}, file)
            saved_at = time.monotonic()
    return before + time.monotonic() - begin


REPORT_SECONDS = 5.0

if __name__ == "__main__":
    main()
