"""Errors in recording and drawing do not end the run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mone_common.run_records import read_metrics
from mone_model.neuron_stats import NeuronUsage
from tests.unit.test_config import run_config
from train import figures
from train.config import RunConfig
from train.config_sections import ExecutionConfig, LoggingConfig
from train.metrics import MetricsWriter, OfflineRecord, put_aside
from train.recorder import Recorder
from train.runtime import Runtime

FORMULA = r"$\x$"


def config_of(folder: Path) -> RunConfig:
    config = run_config(run=ExecutionConfig(dir=str(folder)), logging=LoggingConfig(wandb_mode="disabled"))
    config.data.index_cache = str(folder / "index_cache")
    return config


def recorder_of(config: RunConfig) -> Recorder:
    return Recorder(config, Runtime(0, 1, torch.device("cpu")), [], resume_step=0, samples=0, wandb_id=None)


def test_text_that_looks_like_a_formula_is_drawn_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = recorder_of(config_of(tmp_path))
    assert recorder.record_validation(1, {FORMULA: 2.0}) == 2.0
    recorder.close(1, unigram_entropy=3.0)
    assert (tmp_path / "figures/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "no figure" not in capsys.readouterr().out


def test_the_recorder_catches_errors_of_figures_and_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyError("a bug")

    recorder = recorder_of(config_of(tmp_path))
    assert recorder.writer is not None
    recorder.record(1, {"train/loss": 2.0})
    for name in ("draw_losses", "draw_expert_load", "draw_neuron_use"):
        monkeypatch.setattr(figures, name, fail)
    for name in ("write_histograms", "write", "close"):
        monkeypatch.setattr(MetricsWriter, name, fail)
    zeros = torch.zeros(1, 2)
    usage = NeuronUsage(**{name: zeros for name in NeuronUsage.__dataclass_fields__})
    recorder._draw_usage(1, usage)
    recorder.record(2, {"train/loss": 2.0})
    assert recorder.record_validation(2, {"a": 2.0}) == 2.0
    recorder.close(2, unigram_entropy=3.0)
    printed = capsys.readouterr().out
    assert "no figure: KeyError: 'a bug'" in printed
    assert "no record: KeyError: 'a bug'" in printed
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_an_incomplete_offline_record_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run-1.wandb"
    path.write_bytes(b"header")
    record = OfflineRecord(path)
    record.check_room()
    path.write_bytes(b"header and last records")
    record.check_end(before=6)
    assert capsys.readouterr().out == ""
    record.check_end(before=record.size())
    record.check_end(before=record.size())
    assert capsys.readouterr().out.count(f"W&B's offline record {path} is incomplete: its end is missing") == 1
    full = OfflineRecord(path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 4096}))
    full.check_room()
    full.check_room()
    assert capsys.readouterr().out.count("is incomplete: the disk is full; metrics.jsonl has every record") == 1


def test_invalid_lines_are_moved_to_another_file(tmp_path: Path) -> None:
    odd = ['{"step": NaN, "x": 1}', "[" * 200_000, '{"step": 1' + 400 * "0" + "}", '{"step": null}', "", "[]"]
    lines = ['{"step": 1}', *odd, '{"step": 2}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / ".unfinished-metrics.jsonl").mkdir()
    put_aside(tmp_path / "metrics.jsonl", later_than=2)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == ['{"step": 1}', '{"step": 2}']
    assert (tmp_path / "metrics.later-1.jsonl").read_text().splitlines() == [*odd, '{"step": 3}']
