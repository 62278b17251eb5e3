"""The report's numbers against their own arithmetic, and its page in a real browser."""

import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch.report import main
from launch.results import group_runs, read_runs
from mone_model.config import ModelConfig
from train.config import LoggingConfig, RunConfig, RunSection, TrainingConfig

Call = Callable[..., tuple[int, str, str]]
LOSSES = {1.0: (4.50, 4.60, 4.40), 0.25: (4.56, 4.64, 4.42)}
LAYERS = 2


def write_run(folder: Path, group: str, ratio: float, seed: int, loss: float, state: str = "complete", **model: Any) -> None:
    """A run folder as a run leaves it, without running."""
    folder.mkdir(parents=True)
    config = RunConfig(
        run=RunSection(name=f"{group}/{folder.name}", dir=str(folder), seed=seed),
        model=ModelConfig(num_layers=LAYERS, vocab_size=256, activation_ratio=ratio, **model),
        training=TrainingConfig(steps=20),
        logging=LoggingConfig(wandb_group=group),
    )
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    (folder / "status.json").write_text(json.dumps({"state": state, "time": 1.0}))
    (folder / "environment.json").write_text(json.dumps({"commit": "abc1234"}))
    reading = {"name": "made up", "share": 1.0, "tokens": 1_700_000, "read": 24_600_000, "epochs": 14.47}
    (folder / "data.json").write_text(json.dumps([reading]))
    records: list[dict[str, Any]] = [
        {
            "step": step,
            "train/loss": loss + 20 / step,
            "train/tokens": 1e4 * step,
            "speed/tokens_per_second": 900.0 + step,
            "memory/peak_gib": 0.5,
        }
        for step in range(1, 21)
    ]
    load = {f"expert/load_max/layer_{layer:02d}": 1.5 + layer for layer in range(LAYERS)}
    records += [{"step": 10, "validation/loss": 9.0}, {"step": 20, "validation/loss": loss}, {"step": 20, **load}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two sweeps: three seeds each at two ratios, one of whose runs failed, and a wider one."""
    for ratio, losses in LOSSES.items():
        for seed, loss in enumerate(losses, start=1):
            write_run(tmp_path / f"runs/sweep/activation_ratio={ratio:g},seed={seed}", "sweep", ratio, seed, loss)
    failed = tmp_path / "runs/sweep/activation_ratio=0.25,seed=4"
    write_run(failed, "sweep", 0.25, 4, 99.0, "failed")
    cut = (failed / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]
    (failed / "metrics.jsonl").write_text("".join(cut))
    for ratio, width in ((1.0, 128), (0.25, 256)):
        write_run(tmp_path / f"runs/wide/{width}", "wide", ratio, 1, 4.3, moe_ffn_hidden_size=width)
    return tmp_path / "runs"


def test_seeds_make_a_point_and_failed_runs_do_not_count(runs: Path) -> None:
    points = group_runs(read_runs([runs]))
    assert [(point.group, point.name) for point in points] == [
        ("sweep", "activation_ratio=1"),
        ("sweep", "activation_ratio=0.25"),
        ("wide", "activation_ratio=1"),
        ("wide", "activation_ratio=0.25"),
    ]
    # The width follows from the ratio there: one line in a chart.
    assert {point.series for point in points} == {"sweep", "wide"}
    plain, sparse, *_ = points
    for point in (plain, sparse):
        assert point.validation.values == LOSSES[point.ratio]
        assert point.validation.mean == pytest.approx(statistics.mean(LOSSES[point.ratio]))
        assert point.validation.spread == pytest.approx(statistics.stdev(LOSSES[point.ratio]))
    assert len(sparse.runs) == 4
    # Seed by seed: 0.06, 0.04, 0.02. Their spread is far below that of either point.
    assert sparse.difference(plain).mean == pytest.approx(0.04)
    assert sparse.difference(plain).spread == pytest.approx(0.02)
    assert sparse.mean("train/loss") == pytest.approx(4.54 + 1)


def test_the_page_has_every_number_and_needs_nothing_beside_itself(
    runs: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    code, out, _ = call_main(main, "runs/sweep", "runs/wide", "--title", "Is k < 1 & cheap?")
    assert (code, out.startswith("report/index.html  9 runs, 4 points")) == (0, True)
    page = (runs.parent / "report/index.html").read_text()
    assert "Is k &lt; 1 &amp; cheap?" in page
    assert "1 of 9 runs are not complete (1 failed)" in page
    for cell in (
        "4.5000 ± 0.1000",
        "+0.0400 ± 0.0200",
        "50.0%",
        "128 of 512",
        "3 of 4",
        "abc1234",
        "model.moe_ffn_hidden_size",
        "24.60M",
        "14.47",
    ):
        assert f"{cell}</t" in page, cell
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|https?://|@import""", page)
    pictures = sorted(path.name for path in (runs.parent / "report").glob("*.png"))
    assert {"validation_by_ratio.png", "validation_by_active.png", "training_loss.png", "expert_load_max.png"} <= {*pictures}
    assert page.count("data:image/png;base64,") == len(pictures)
    tables = list((runs.parent / "report/wandb").glob("offline-run-*-report-*/files/media/table/table/*.table.json"))
    assert sorted(path.name.split("_")[0] for path in tables) == ["Data", "Points", "Runs", "Settings that differ"]
    (points,) = (json.loads(path.read_text()) for path in tables if path.name.startswith("Points"))
    assert points["data"][1][:4] == ["sweep: activation_ratio=0.25", "3 of 4", "4.5400 ± 0.1114", "+0.0400 ± 0.0200"]


MEASURE = """<iframe src="report/index.html" width="{width}" height="900"></iframe><pre id="found"></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  document.getElementById("found").textContent = JSON.stringify({{
    sideways: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    broken: [...page.images].filter(image => !image.complete || image.naturalWidth == 0).length,
    shown: [...page.images].filter(image => image.getBoundingClientRect().width > 250).length,
    letters: parseFloat(getComputedStyle(page.querySelector("td")).fontSize),
    titles: [...page.querySelectorAll("h2")].map(title => title.textContent),
  }});
}};
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [375, 1280])
def test_it_opens_in_a_browser_on_a_phone_and_on_a_desk(
    runs: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.chdir(runs.parent)
    assert call_main(main, "runs", "--wandb", "disabled")[0] == 0
    assert not (runs.parent / "report/wandb").exists()
    (runs.parent / "measure.html").write_text(MEASURE.format(width=width))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    )
    flags += f" --disable-component-update --allow-file-access-from-files --user-data-dir={runs.parent}/browser --dump-dom"
    browser = ["chromium", *flags.split(), "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000"]
    done = subprocess.run([*browser, f"file://{runs.parent}/measure.html"], capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)
    found = json.loads(found)
    assert found["sideways"] == 0, "tables scroll on their own, the page does not"
    assert found["broken"] == 0
    assert found["shown"] >= 6
    assert found["letters"] >= 14
    assert found["titles"] == [
        *("Validation loss", "Training loss", "Experts and neurons"),
        *("Points", "Settings that differ", "Runs"),
    ]


def test_a_single_running_run_is_reported_too(tmp_path: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "one", "one", 0.5, 1, 4.0, "running")
    assert call_main(main, "one", "--wandb", "disabled", "--output", "out/here")[0] == 0
    assert "1 ended without a word" in (tmp_path / "out/here/index.html").read_text()


def test_the_same_run_twice_is_refused(runs: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    assert "9 runs" in call_main(main, "runs", "runs/sweep", "--wandb", "disabled")[1], "named twice is read once"
    shutil.copytree(runs / "sweep/activation_ratio=1,seed=2", runs / "sweep/copy")
    code, _, error = call_main(main, "runs", "--wandb", "disabled")
    assert code == 2
    assert "copy are the same run, seed 2" in error


def test_what_holds_no_run_is_named(tmp_path: Path, call_main: Call) -> None:
    code, _, error = call_main(main, str(tmp_path))
    assert code == 2
    assert f"{tmp_path}: no run there" in error
