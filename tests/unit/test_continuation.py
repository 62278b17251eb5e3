"""The checkpoint that a run continues from, tested with short runs in this process."""

import contextlib
import dataclasses
import importlib.metadata
import json
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from omegaconf import OmegaConf

from data_prep.shards import load_manifest
from launch.results import read_runs
from mone_common.checkpoint_folder import BACKEND, COMMON, MANIFEST, METADATA, Checkpoint, digest, name_of
from mone_common.console import ReportedError, showing_log
from mone_model.config import ComputeConfig, ModelConfig, RatioPoint
from mone_model.hf.imported_model import find_model
from mone_model.hf.loading import load
from tests.tiny import TINY_MODEL, make_shards
from train import training_run
from train.checkpoint import NotFinite, Saver
from train.checkpoint_facts import CheckpointFacts
from train.config import RunConfig
from train.config_init import InitConfig
from train.config_sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExecutionConfig,
    GuardConfig,
    LoggingConfig,
    OptimizerConfig,
    SourceConfig,
    TrainingConfig,
)
from train.data import load_data, micro_batches
from train.engines import build_engine
from train.guards import Diverged
from train.loop import Trainer
from train.meeting import Meeting
from train.preparation import prepare_run
from train.run_notes import take_run_folder
from train.runtime import Runtime, set_seeds
from train.sample_order import plan_order
from train.trained_model import load_model, load_run_config

pytestmark = pytest.mark.usefixtures("one_process")
STEPS = 6
Train = Callable[[RunConfig], str]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "a", name="a")


def config_of(folder: Path, shards: Path, **sections: Any) -> RunConfig:
    """The config of a tiny run that saves every second step; sections: options to change."""
    options: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "dir": str(folder)},
        "model": TINY_MODEL,
        "compute": {"experts": "grouped"},
        "training": {"steps": STEPS, "micro_batch_size": 4, "global_batch_size": 4},
        "optimizer": {"warmup_steps": 1},
        "data": {"blend": [SourceConfig(path=str(shards))], "index_cache": str(folder / "index_cache")},
        "evaluation": {"interval": 0, "sequences": 4},
        "checkpoint": {"interval": 2},
        "guard": {},
        "logging": {"interval": 1, "neuron_interval": 0, "figure_interval": 0, "wandb_mode": "disabled"},
    }
    kinds = {
        "run": ExecutionConfig,
        "model": ModelConfig,
        "compute": ComputeConfig,
        "training": TrainingConfig,
        "optimizer": OptimizerConfig,
        "data": DataConfig,
        "evaluation": EvaluationConfig,
        "checkpoint": CheckpointConfig,
        "guard": GuardConfig,
        "logging": LoggingConfig,
    }
    engine = sections.pop("engine", "megatron")
    made = {name: kind(**options[name] | sections.get(name, {})) for name, kind in kinds.items()}
    return RunConfig(engine=engine, resume=sections.get("resume", "auto"), **made)


@pytest.fixture(autouse=True)
def _log_on_stderr() -> Iterator[None]:
    with showing_log():
        yield


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Train]:
    """Train like train.pretrain in the process group of this process; returns the output."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    }

    @contextlib.contextmanager
    def here(parallel: Any, *, seed: int, **_: Any) -> Iterator[Runtime]:
        set_seeds(seed)
        yield Runtime(0, 1, torch.device("cpu"))

    monkeypatch.setattr(training_run, "distributed", here)
    monkeypatch.setattr("train.figures.draw_losses", lambda path, *_: path.parent.mkdir(exist_ok=True))

    def run(config: RunConfig) -> str:
        capsys.readouterr()
        try:
            checked, manifests, checkpoints = prepare_run(OmegaConf.structured(config), 1)
            take_run_folder(checked).close()
            training_run.train_run(checked, manifests, checkpoints, Meeting(0, 1))
        except ReportedError as error:
            error.add_note("".join(capsys.readouterr()))
            raise
        return "".join(capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Cached runs, by engine and precision."""
    return {}


@pytest.fixture
def run_folder(saved: dict[str, Path], train: Train, tmp_path: Path, shards: Path) -> Path:
    """A run that stopped at step 4, with checkpoints of steps 2 and 4."""
    if "run" not in saved:
        saved["run"] = shards.parent / "run"
        train(config_of(saved["run"], shards, run={"stop_at_step": 4}))
    shutil.copytree(saved["run"], tmp_path / "run")
    return tmp_path / "run"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit_facts(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | changes))


def sign(path: Path, *names: str) -> None:
    """Update the manifest to the current files."""
    files = json.loads((path / MANIFEST).read_text())["files"]
    edit_facts(path, files=files | {name: digest(path / name) for name in names})


def edit_index(path: Path, edit: Callable[[Any], Any]) -> None:
    index = pickle.loads((path / METADATA).read_bytes())
    edit(index)
    (path / METADATA).write_bytes(pickle.dumps(index))
    sign(path, METADATA)


def edit_common(path: Path, **changes: Any) -> None:
    torch.save(load_common_state_dict(str(path)) | changes, path / COMMON)  # 0.19 reads it, but writes none
    sign(path, COMMON)


def edit_schedule(path: Path, **changes: Any) -> None:
    edit_common(path, scheduler=load_common_state_dict(str(path))["scheduler"] | changes)


def replace_common(path: Path) -> None:
    torch.save([1], path / COMMON)
    sign(path, COMMON)


def edit_backend(path: Path, text: str) -> None:
    (path / BACKEND).write_text(text)
    sign(path, BACKEND)


def save_again(path: Path, shards: Path, change: Callable[[dict[str, Any]], Any], **sections: Any) -> None:
    """Rewrite a checkpoint with other options or another state; its facts do not change."""
    manifest = json.loads((path / MANIFEST).read_text())
    config = config_of(path, shards, **sections)
    engine = build_engine(config, Runtime(0, 1, torch.device("cpu")))
    state = engine.sharded_state(loading=True)
    state["scheduler"]["num_steps"], state["optimizer_step"] = manifest["step"], manifest["step"]
    change(state)
    shutil.rmtree(path)
    facts = CheckpointFacts.from_dict(manifest, step=manifest["step"])
    saver = Saver(path.parent, CheckpointConfig(keep_last=9))
    saver.save(step=manifest["step"], state=state, facts=facts)
    saver.finish(wait=True)


def drop(tree: dict[str, Any], ending: str) -> None:
    """The optimizer state of one kind of one weight."""
    optimizer = tree["optimizer"]
    del optimizer[next(key for key in optimizer if key.endswith(ending))]


def forget_a_piece(index: Any) -> None:
    name = "decoder.layers.mlp.router.weight"
    del index.storage_data[next(place for place in index.storage_data if place.fqn == name)]


def forget_a_chunk(index: Any) -> None:
    entry = index.state_dict_metadata["decoder.layers.mlp.router.weight"]
    index.state_dict_metadata["decoder.layers.mlp.router.weight"] = dataclasses.replace(entry, chunks=entry.chunks[:1])


def point_to(index: Any, name: str, offset: int = 0) -> None:
    place = next(place for place in index.storage_data if place.fqn == "output_layer.weight")
    index.storage_data[place] = dataclasses.replace(index.storage_data[place], relative_path=name, offset=offset)


def swap_pieces(index: Any) -> None:
    """Swap the content of two weights of different shapes."""
    one, other = (
        next(place for place in index.storage_data if place.fqn == name)
        for name in ("decoder.layers.mlp.router.weight", "output_layer.weight")
    )
    index.storage_data[one], index.storage_data[other] = index.storage_data[other], index.storage_data[one]


ORDER = {"seed": 1234, "start": 0, "sources": [], "earlier": []}
NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "samples below zero": ({"samples": -4}, "samples: -4"),
    "samples that are text": ({"samples": "16"}, "samples"),
    "samples that are true": ({"samples": True}, "samples"),
    "too few samples": ({"samples": 3}, "samples"),
    "more samples than there are": ({"samples": 10**18}, "samples"),
    "a guard that is a list": ({"guard": []}, "guard"),
    "a guard of text": ({"guard": {"dropped": ["1"], "recent": []}}, "guard"),
    "a guard of the future": ({"guard": {"dropped": [5], "recent": []}}, "guard"),
    "a guard of numbers for pairs": ({"guard": {"dropped": [], "recent": [1, 2]}}, "guard"),
    "an order that is null": ({"order": None}, "order"),
    "an order of no sources": ({"order": ORDER}, "order"),
    "an order of nonsense": ({"order": ORDER | {"sources": [{"name": 1}]}}, "order"),
    "an unknown engine": ({"engine": "jax"}, "engine: jax"),
    "unknown experts": ({"experts": ["grouped"]}, "experts"),
    "a model that is text": ({"model": "mone_tiny"}, "model"),
    "a world without processes": ({"world_size": 0}, "world_size: 0"),
    "an optimizer of nonsense": ({"optimizer": {"lr": "high"}}, "optimizer"),
    "the id of another run": ({"run": "another"}, "foreign: it belongs to the run with id another"),
    "another model": ({"model": {"num_layers": 7}}, "belongs to another run: model.num_layers=2 (saved: 7)"),
}
MISFITS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a backend of nonsense": (lambda path, shards: edit_backend(path, "[" * 10**5), "does not fit"),
    "a schedule of another step": (
        lambda path, shards: edit_schedule(path, num_steps=3),
        "its schedule is at step 3",
    ),
    "a schedule of text": (
        lambda path, shards: edit_common(
            path, scheduler=load_common_state_dict(str(path))["scheduler"] | {"max_lr": "high"}
        ),
        "scheduler.max_lr is high",
    ),
    "steps of the optimizer below zero": (lambda path, shards: edit_common(path, optimizer_step=-1), "optimizer_step is -1"),
    "common.pt that is a list": (
        lambda path, shards: replace_common(path),
        "does not fit",
    ),
    "an index without a piece": (lambda path, shards: edit_index(path, forget_a_piece), "does not locate a part of"),
    "an index without a chunk": (lambda path, shards: edit_index(path, forget_a_chunk), "does not locate a part of"),
    "an index to a device": (
        lambda path, shards: edit_index(path, lambda index: point_to(index, "/dev/zero")),
        "not one of its",
    ),
    "an index beyond a file": (
        lambda path, shards: edit_index(path, lambda index: point_to(index, "__0_0.distcp", 10**9)),
        "beyond the end of __0_0.distcp",
    ),
    "an index that mixes weights up": (lambda path, shards: edit_index(path, swap_pieces), "damaged: rank 0"),
    "shapes of a wider model": (
        lambda path, shards: save_again(path, shards, lambda state: None, model={"moe_ffn_hidden_size": 64}),
        "has shape",
    ),
    "shapes of another vocabulary": (
        lambda path, shards: save_again(path, shards, lambda state: None, model={"vocab_size": 128}),
        "has shape [128, 32], not [64, 32]",
    ),
    "one moment missing": (
        lambda path, shards: save_again(path, shards, lambda state: drop(state, "exp_avg")),
        "optimizer.state.exp_avg.",
    ),
    "one weight missing": (
        lambda path, shards: save_again(path, shards, lambda state: state["model0"].pop("output_layer.weight")),
        "output_layer.weight is missing",
    ),
    "one weight too many": (
        lambda path, shards: save_again(
            path,
            shards,
            lambda state: state.update(more=ShardedTensor.from_rank_offsets("adapter.weight", torch.ones(2, 2))),
        ),
        "the model has no adapter.weight",
    ),
    "a random state of nonsense": (
        lambda path, shards: edit_random(path),
        "random state",
    ),
    "weights that are no numbers": (
        lambda path, shards: save_without_check(path, shards, lambda state: spoil(state["model0"], torch.nan)),
        "is not finite",
    ),
    "a moment that is infinite": (
        lambda path, shards: save_without_check(path, shards, lambda state: spoil(state["optimizer"], torch.inf)),
        "is not finite",
    ),
}
if importlib.metadata.version("megatron-core").startswith("0.16."):  # 0.19 ignores what the backend is called
    MISFITS["an unknown backend"] = (
        lambda path, shards: edit_backend(path, '{"sharded_backend": "zarr", "sharded_backend_version": 1}'),
        "does not fit",
    )


def spoil(entries: dict[str, Any], value: float) -> None:
    """Change one number of the last tensor."""
    [*_, entry] = (entry for entry in entries.values() if torch.is_tensor(getattr(entry, "data", None)))
    entry.data.detach().view(-1)[-1] = value


def save_without_check(path: Path, shards: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Publish without the check of the weights, like an earlier version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.checkpoint.find_not_finite", lambda state: None)
        save_again(path, shards, change)


def edit_random(path: Path) -> None:
    """Replace the state of the generators by other objects of the same length."""
    index = pickle.loads((path / METADATA).read_bytes())
    place = next(place for place in index.storage_data if place.fqn.startswith("random/"))
    where = index.storage_data[place]
    torch.save([{"torch": "nonsense"}], path / "other")
    content = (path / "other").read_bytes()
    (path / "other").unlink()
    file = path / where.relative_path
    whole = file.read_bytes()
    file.write_bytes(whole + content)
    sign(path, where.relative_path)

    def point(index: Any) -> None:
        index.storage_data[place] = dataclasses.replace(where, offset=len(whole), length=len(content))

    edit_index(path, point)


ENGINES: dict[str, Any] = {}


def fill(config: RunConfig, checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """Load into an engine that all tests of this kind share."""
    if config.engine not in ENGINES:
        ENGINES[config.engine] = build_engine(config, Runtime(0, 1, torch.device("cpu")))
    return training_run.fill_engine(config, ENGINES[config.engine], checkpoints, Quiet())  # type: ignore[arg-type]


def weights(engine: str) -> dict[str, torch.Tensor]:
    """The state of the loaded engine."""
    state = ENGINES[engine].modules[0].state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if torch.is_tensor(tensor)}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_checkpoint_with_invalid_facts_is_skipped(
    run_folder: Path, shards: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    changes, message = NONSENSE[kind]
    edit_facts(run_folder / "checkpoints" / name_of(4), **changes)
    _, _, checkpoints = prepare_run(OmegaConf.structured(config_of(run_folder, shards)), 1)
    assert [checkpoint.step for checkpoint in checkpoints] == [2]
    assert_named(capsys, run_folder, message)


@pytest.mark.parametrize("kind", MISFITS)
def test_an_intact_checkpoint_that_does_not_fit_is_skipped(
    run_folder: Path, shards: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    spoil, message = MISFITS[kind]
    spoil(run_folder / "checkpoints" / name_of(4), shards)
    config, _, checkpoints = prepare_run(OmegaConf.structured(config_of(run_folder, shards)), 1)
    checkpoint = fill(config, checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert_named(capsys, run_folder, message)


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
@pytest.mark.parametrize("kind", ["one moment missing", "weights that are no numbers"])
def test_a_failed_load_leaves_the_model_unchanged(
    run_folder: Path, shards: Path, capsys: pytest.CaptureFixture[str], engine: str, kind: str
) -> None:
    spoil, message = MISFITS[kind]
    spoil(run_folder / "checkpoints" / name_of(4), shards)
    config, _, checkpoints = prepare_run(OmegaConf.structured(config_of(run_folder, shards, engine=engine)), 1)
    fill(config, checkpoints)
    assert_named(capsys, run_folder, message)
    after = weights(engine)
    fill(config, checkpoints[:1])
    for name, tensor in weights(engine).items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, after[name]), name


def assert_named(capsys: pytest.CaptureFixture[str], run_folder: Path, message: str) -> None:
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1, told
    assert told.startswith(f"skipped {run_folder / 'checkpoints' / name_of(4)}: ")
    assert message in told


class Quiet:
    """A watchdog that does nothing."""

    def enter(self, step: int, phase: str) -> None:
        """Do nothing."""


def records(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    """The steps in the metrics."""
    lines = (folder / name).read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "train/loss" in record]


def test_a_damaged_newest_checkpoint_loses_only_its_steps(run_folder: Path, shards: Path, train: Train) -> None:
    saves = run_folder / "checkpoints"
    next((saves / name_of(4)).glob("*.distcp")).write_bytes(b"")
    # The first save is of an earlier step than the damaged checkpoint, which must not count for keep_last.
    keep = {"checkpoint": {"interval": 1, "keep_last": 1}}
    output = train(config_of(run_folder, shards, run={"stop_at_step": 3}, **keep))
    assert f"skipped {saves / name_of(4)}: damaged" in output
    assert names_in(saves) == [name_of(step) for step in (2, 3, 4)]
    assert "records of steps after 2 are kept in" in output
    assert records(run_folder, "metrics.later-1.jsonl") == [3, 4]
    output = train(config_of(run_folder, shards, **keep))
    assert f"resumed from {saves / name_of(3)} at step 3" in output
    assert f"{saves / name_of(4)} was not a complete checkpoint of this run; it is kept as" in output
    assert names_in(saves) == [f"replaced-{name_of(4)}", name_of(3), name_of(6)]
    assert records(run_folder) == list(range(1, STEPS + 1))
    output = train(config_of(run_folder, shards, **keep))
    assert "\ncomplete\n" in output
    assert name_of(6) in output


def remove(saves: Path) -> None:
    shutil.rmtree(saves)


def leave_a_link(saves: Path) -> None:
    saves.rename(saves.with_name("disk"))
    saves.symlink_to("disk")
    saves.with_name("disk").rename(saves.with_name("unmounted"))


def empty(saves: Path) -> None:
    shutil.rmtree(saves)
    saves.mkdir()


def hide(saves: Path) -> None:
    for path in saves.iterdir():
        path.rename(saves / f".{path.name}")


@pytest.mark.parametrize("lose", [remove, leave_a_link, empty, hide])
@pytest.mark.parametrize("version", ["this", "an earlier one", "one that was killed", "without records"])
def test_a_run_with_missing_checkpoints_does_not_start_again(
    run_folder: Path, shards: Path, lose: Callable[[Path], None], version: str
) -> None:
    lose(run_folder / "checkpoints")
    if version != "this":
        (run_folder / "published.json").unlink()
    if version == "one that was killed":
        (run_folder / "status.json").write_text('{"state": "running", "time": 1.0}')
    if version == "without records":
        (run_folder / "metrics.jsonl").unlink()
    before = {path.name: path.read_bytes() for path in run_folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=f"run.dir={run_folder}: .*{run_folder / 'checkpoints'}"):
        prepare_run(OmegaConf.structured(config_of(run_folder, shards)), 1)
    assert before == {path.name: path.read_bytes() for path in run_folder.iterdir() if path.is_file()}


def test_a_run_killed_before_its_first_save_starts_again_and_keeps_its_records(
    tmp_path: Path, shards: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer, *, must: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            train(config_of(tmp_path / "run", shards))
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tra')
    output = train(config_of(tmp_path / "run", shards, training={"steps": 2}))
    assert "records of steps after 0 are kept in" in output
    assert records(tmp_path / "run") == records(tmp_path / "run", "metrics.later-1.jsonl") == [1, 2]


def test_a_higher_learning_rate_after_a_resume_is_reported(run_folder: Path, shards: Path, train: Train) -> None:
    output = train(config_of(run_folder, shards))
    assert "schedule  cosine, 1 steps of warm-up to 0.001, 0.0001 at step 6; 0.000186 at step 5\n" in output
    longer = {"steps": 20}
    options = {"run": {"stop_at_step": 8}, "evaluation": {"interval": 7, "sequences": 4}, "training": longer}
    output = train(config_of(run_folder, shards, **options))
    assert re.search(
        r"0.0001 at step 20; 0.0007\d+ at step 7; before the resume cosine, .* step 6; 0.0001 at step 7\n", output
    )
    assert re.search(
        r"warning: the learning rate jumps from 0.0001 to 0.0007\d+; optimizer.decay_steps=6 would keep", output
    )
    assert re.search(r"validation loss \d.* at step 7; token frequencies", output), "the run stopped at step 8"
    kept = {"training": longer, "optimizer": {"warmup_steps": 1, "decay_steps": 20}}
    output = train(config_of(run_folder, shards, **kept, run={"stop_at_step": 9}))
    assert "before the resume" not in output
    assert "warning" not in output


def test_checkpoints_of_earlier_versions_load_and_are_not_deleted(run_folder: Path, shards: Path, train: Train) -> None:
    (run_folder / "published.json").unlink()
    for step in (2, 4):
        path = run_folder / "checkpoints" / name_of(step) / MANIFEST
        facts = json.loads(path.read_text())
        del facts["model"]["qk_layernorm_scope"]  # which means its default
        path.write_text(json.dumps({name: facts[name] for name in facts.keys() - {"run", "optimizer", "steps", "initial"}}))
    output = train(config_of(run_folder, shards, checkpoint={"interval": 1, "keep_last": 1}))
    assert "does not record the schedule" in output
    assert names_in(run_folder / "checkpoints") == [name_of(step) for step in (2, 4, 6)]


def test_non_finite_weights_are_never_saved(
    tmp_path: Path, shards: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> None:
        inner(self, batches)
        if self.step == 4:
            next(self.engine.modules[0].parameters()).data.view(-1)[3] = torch.nan

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(NotFinite, match=r"step 4: .* is not finite, and not saved") as raised:
        train(config_of(tmp_path / "run", shards, evaluation={"interval": 0, "sequences": 4}))
    assert raised.value.exit_code == 3
    assert names_in(tmp_path / "run/checkpoints") == [name_of(2)]


def test_a_run_whose_last_steps_were_all_dropped_fails(
    run_folder: Path, shards: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (losses_BS.float() * mask_BS).sum() * (torch.nan if torch.is_grad_enabled() else 1.0), mask_BS.sum()

    with monkeypatch.context() as patch:
        patch.setattr("train.engines.megatron.sums_of_losses", poison)
        for _ in range(2):
            with pytest.raises(Diverged, match=r"all of the last 2 steps were dropped .*not finite"):
                train(config_of(run_folder, shards))
        # If no step was applied since the last checkpoint, no new one replaces older ones.
        many = {"training": {"steps": 20}, "guard": {"max_dropped": 5}, "checkpoint": {"interval": 2, "keep_last": 1}}
        with pytest.raises(Diverged, match="No step was applied since the checkpoint of step 4; .* move it away"):
            train(config_of(run_folder, shards, **many))
    assert names_in(run_folder / "checkpoints") == [name_of(2), name_of(4)]
    assert "\ncomplete\n" in train(config_of(run_folder, shards))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without what depends on the machine."""
    return [
        {
            name: value
            for name, value in record.items()
            if name.split("/")[0] not in ("time", "speed", "memory", "checkpoint")
        }
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]


def branch_of(source: Path, folder: Path, shards: Path, **sections: Any) -> RunConfig:
    """A run that branches off another one."""
    init = {"source": str(source), "branch": True} | sections.pop("init", {})
    config = config_of(folder, shards, **sections)
    return dataclasses.replace(config, init=InitConfig(**init))


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_branch_with_the_options_of_its_source_is_the_source_continued(
    engine: str, shards: Path, tmp_path: Path, train: Train
) -> None:
    model = TINY_MODEL | {"hidden_dropout": 0.1, "neuron_score": "random"}
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    train(config_of(trunk, shards, engine=engine, model=model))
    options = branch_of(trunk, branch, shards, engine=engine, model=model, init={"step": 4}, run={"stop_at_step": 5})
    said = train(options)
    assert f"branched off {trunk}/checkpoints/step-00000004 at step 4" in said
    assert "resumed from" in train(dataclasses.replace(options, run=ExecutionConfig(dir=str(branch))))
    expected = [record for record in metrics(trunk) if record["step"] > 4]
    assert [record for record in metrics(branch) if "train/loss" in record] == [
        record for record in expected if "train/loss" in record
    ]
    assert metrics(branch)[-1] == metrics(trunk)[-1]
    files = [json.loads((folder / "checkpoints/step-00000006" / MANIFEST).read_text()) for folder in (trunk, branch)]
    assert files[0]["run"] != files[1]["run"]
    assert files[1]["initial"]["source"] == str(trunk / "checkpoints/step-00000004")
    assert files[1]["initial"]["run"] == files[0]["run"]
    assert files[0]["samples"] == files[1]["samples"]


def test_branches_change_the_schedule_and_the_neurons_and_read_new_text(
    run_folder: Path, shards: Path, tmp_path: Path, train: Train
) -> None:
    before = names_in(run_folder / "checkpoints")
    for name, step, options in (
        ("early", 2, {"training": {"steps": 4}}),
        ("late", 4, {"model": TINY_MODEL | {"activation_ratio": 1.0, "neuron_balance_coeff": 0.1}}),
    ):
        optimizer = {"schedule": "wsd", "warmup_steps": 1, "wsd_decay_steps": 2, "lr": 1e-3, "min_lr": 0.0}
        said = train(branch_of(run_folder, tmp_path / name, shards, init={"step": step}, optimizer=optimizer, **options))
        assert "; in the source cosine" in said
        found = [record for record in metrics(tmp_path / name) if "train/loss" in record]
        assert [record["step"] for record in found] == [step + 1, step + 2]
        assert [record["train/learning_rate"] for record in found] == pytest.approx([5e-4, 0.0])
        assert found[0]["train/tokens"] == (step + 1) * 4 * TINY_MODEL["seq_length"]
        (run,) = read_runs([tmp_path / name])
        assert run.trained_tokens == 2 * 4 * TINY_MODEL["seq_length"]
    assert "aux/neuron_balance_loss" in found[-1]
    checkpoint = run_folder / "checkpoints/step-00000004"
    with pytest.raises(ReportedError, match="is the checkpoint of step 4, not of step=2"):
        train(branch_of(checkpoint, tmp_path / "other", shards, init={"step": 2}))
    assert "at step 4" in train(branch_of(checkpoint, tmp_path / "same", shards, init={"step": 4}))
    assert names_in(run_folder / "checkpoints") == before


def test_a_branch_leaves_out_damaged_checkpoints(run_folder: Path, shards: Path, tmp_path: Path, train: Train) -> None:
    files = [sorted(path.glob("*.distcp"))[0] for path in sorted((run_folder / "checkpoints").iterdir())]
    damage(files[1])
    assert "step-00000002 at step 2" in train(branch_of(run_folder, tmp_path / "older", shards))
    (files[1].parent / MANIFEST).write_text("{")
    assert "step-00000002 at step 2" in train(branch_of(run_folder, tmp_path / "listed", shards))
    damage(files[0])
    with pytest.raises(ReportedError, match=r"init.source=.*none of its checkpoints can be loaded"):
        train(branch_of(run_folder, tmp_path / "none", shards))
    assert not (tmp_path / "none/metrics.jsonl").exists()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"seq_length": 8}}, r"model.seq_length=8: a branch of .* needs model.seq_length=16"),
        ({"model": {"neuron_bias": True}}, r"model.neuron_bias=True: a branch of .* needs model.neuron_bias=False"),
        ({"model": {"num_experts": 8}}, r"init.source=.*: does not fit: model.num_experts=8 \(source: 4\)"),
        ({"compute": {"precision": "bf16"}}, r"compute.precision=bf16: a branch of .* needs compute.precision=fp32"),
        ({"training": {"steps": 4}}, r"training.steps=4: .* is already at step 4"),
        ({"run": {"seed": 7}}, r"run.seed=7 \(saved: 1234\)"),
        ({"init": {"step": 3}}, r"init.source=.* has no checkpoint of step=3"),
    ],
)
def test_branches_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, run_folder: Path, shards: Path, tmp_path: Path, train: Train
) -> None:
    options = options | ({"model": TINY_MODEL | options["model"]} if "model" in options else {})
    with pytest.raises(ValueError, match=message):
        train(branch_of(run_folder, tmp_path / "branch", shards, **options))
    assert not (tmp_path / "branch").exists()


SCHEDULE = {"activation_ratio_schedule": [RatioPoint(0, 1.0), RatioPoint(4)], "activation_ratio_curve": "steps"}


@pytest.mark.parametrize(("engine", "experts"), [("megatron", "sparse"), ("deepspeed", "grouped")])
def test_a_schedule_of_the_ratio_is_a_branch_with_another_ratio(
    engine: str, experts: str, shards: Path, tmp_path: Path, train: Train
) -> None:
    base = {"engine": engine, "compute": {"experts": experts}, "checkpoint": {"interval": 0}}
    balance = {"neuron_balance_coeff": 0.1, "neuron_balance_form": "unmasked"}
    model = TINY_MODEL | balance
    plain, branch, whole = (tmp_path / name for name in ("plain", "branch", "whole"))
    train(config_of(plain, shards, model=model | {"activation_ratio": 1.0}, run={"stop_at_step": 3}, **base))
    train(branch_of(plain, branch, shards, model=model, **base))
    said = train(config_of(whole, shards, model=model | SCHEDULE, run={"stop_at_step": 3}, **base))
    assert "in training 1 at step 0, 0.25 at step 4 (steps)\n" in said
    assert "warning: training.steps" not in said
    train(config_of(whole, shards, model=model | SCHEDULE, **base))
    found = metrics(whole)
    assert [record.pop("train/activation_ratio") for record in found if "train/loss" in record] == [1.0] * 3 + [0.25] * 3
    assert found == metrics(plain) + [record for record in metrics(branch) if record["step"] > 3]


def test_validation_and_loaded_checkpoints_use_the_ratio_of_their_step(shards: Path, tmp_path: Path, train: Train) -> None:
    model = TINY_MODEL | {"activation_ratio_schedule": [RatioPoint(0, 1.0), RatioPoint(6)]}
    options: dict[str, Any] = {"model": model, "evaluation": {"interval": 2, "sequences": 4}}
    train(config_of(tmp_path / "run", shards, run={"dir": str(tmp_path / "run"), "stop_at_step": 4}, **options))
    losses = [record["validation/loss"] for record in metrics(tmp_path / "run") if "validation/loss" in record]
    assert len(losses) == 2
    assert [found.step for found in find_model(tmp_path / "run").checkpoints] == [2, 4]
    for step, ratio, loss in ((2, 0.75, losses[0]), (4, 0.5, losses[1])):
        config = load_run_config(tmp_path / "run")
        loaded = load_model(config, step=step)
        assert config.model.activation_ratio == ratio
        twin, _ = load(tmp_path / "run", step=step)
        assert twin.config.activation_ratio == ratio
        manifests = [load_manifest(shards)]
        data = load_data(config, manifests, plan_order(config, manifests, None, 0), samples=1)
        batch = next(
            iter(micro_batches(data.validation["a"], start=0, stop=4, micro_batch_size=4, data_rank=0, data_size=1))
        )
        with torch.no_grad():
            of_ours = loaded(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean().item()
            logits = twin(batch["tokens"]).logits
        of_twin = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
        assert of_ours == pytest.approx(loss, rel=1e-6)
        assert of_twin == pytest.approx(loss, rel=1e-5)
