"""The numbers of the report, its summary sentence, and its page in a browser."""

import html
import json
import math
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch import charts
from launch.baselines import Comparison, compare
from launch.findings import sentence
from launch.recorded import read_record, write_record
from launch.report import main
from launch.results import group_runs, labels, read_runs
from mone_model.config import ModelConfig
from train.config import RunConfig
from train.config_sections import ExecutionConfig, LoggingConfig, TrainingConfig

Call = Callable[..., tuple[int, str, str]]
LOSSES = {1.0: (4.50, 4.60, 4.40), 0.25: (4.56, 4.64, 4.42)}
LAYERS = 2


def write_run(
    folder: Path,
    group: str | None,
    ratio: float,
    seed: int,
    loss: float,
    state: str = "complete",
    options: Sequence[str] = (),
    **model: Any,
) -> None:
    """Write a run folder without training; group: name of the sweep, None for a run outside of sweeps."""
    folder.mkdir(parents=True)
    config = RunConfig(
        run=ExecutionConfig(name=f"{group}/{folder.name}" if group else folder.name, dir=str(folder), seed=seed),
        model=ModelConfig(num_layers=LAYERS, vocab_size=256, activation_ratio=ratio, **model),
        training=TrainingConfig(steps=20),
        logging=LoggingConfig(wandb_group=group),
    )
    composed = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
    OmegaConf.save(OmegaConf.merge(composed, OmegaConf.from_dotlist(list(options))), folder / "config.yaml")
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
    by_layer = {f"expert/load_max/layer_{layer:02d}": 1.5 + layer for layer in range(LAYERS)}
    by_layer |= {f"neuron/overlap/layer_{layer:02d}": 1.0 if ratio == 1 else ratio + layer / 50 for layer in range(LAYERS)}
    by_layer |= {f"neuron/dead/layer_{layer:02d}": 0.0 for layer in range(LAYERS)}
    records += [{"step": 10, "validation/loss": 9.0}, {"step": 20, "validation/loss": loss}, {"step": 20, **by_layer}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two sweeps: one with three seeds at two ratios and a failed run, and one with wider experts."""
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
    # Differences by seed: 0.06, 0.04, 0.02. Their spread is far below that of either point.
    assert sparse.difference(plain).mean == pytest.approx(0.04)
    assert sparse.difference(plain).spread == pytest.approx(0.02)
    assert sparse.mean("train/loss") == pytest.approx(4.54 + 1)


def test_the_page_has_every_number_and_no_external_files(
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
        "-0.0097 to +0.0897",
    ):
        assert f"{cell}</t" in page, cell
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|https?://|@import""", page)
    pictures = sorted(path.name for path in (runs.parent / "report").glob("*.png"))
    assert {"validation_by_ratio.png", "validation_by_active.png", "training_loss.png", "expert_load_max.png"} <= {*pictures}
    assert page.count("data:image/png;base64,") == len(pictures)
    tables = list((runs.parent / "report/wandb").glob("offline-run-*-report-*/files/media/table/table/*.table.json"))
    assert sorted(path.name.split("_")[0] for path in tables) == [
        "Data",
        "Differences",
        "Points",
        "Runs",
        "Settings that differ",
    ]
    (points,) = (json.loads(path.read_text()) for path in tables if path.name.startswith("Points"))
    assert points["data"][1][:4] == ["sweep: activation_ratio=0.25", "3 of 4", "4.5400 ± 0.1114", "+0.0400 ± 0.0200"]


def compared(folder: Path, **baseline: Any) -> dict[str, Comparison | None]:
    """The comparison of each point, by label."""
    points = group_runs(read_runs([folder]))
    return dict(zip(labels(points), compare(points, **baseline), strict=True))


def finding(folder: Path) -> str:
    points = group_runs(read_runs([folder]))
    return sentence(points, compare(points), "the plain MoE")


def test_a_run_is_compared_with_its_plain_twin_in_another_folder(
    tmp_path: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/demo", None, 0.25, 1, 4.47)
    write_run(tmp_path / "runs/plain", None, 1.0, 1, 4.5)
    code, out, _ = call_main(main, "runs/demo", "runs/plain", "--wandb", "disabled")
    assert (code, out.splitlines()[0].startswith("report/index.html  2 runs, 2 points")) == (0, True)
    page = (tmp_path / "report/index.html").read_text()
    assert "<td>-0.0300</td>" in page
    said = "demo, which touches 50.0% of its experts' weights for each token, ends at a validation loss of 4.4700 nats per "
    said += "token, 0.0300 below that of the plain MoE (plain, 4.5000): one seed each, so the difference may be chance."
    assert finding(tmp_path / "runs") == said
    # It is the first paragraph of the page.
    assert re.findall(r"<p[^>]*>([^<]*)</p>", page)[0] == said.replace("'", "&#x27;")


@pytest.mark.parametrize(
    ("options", "comparable"),
    [
        (["parallel.expert=2", "training.micro_batch_size=4"], True),
        (["engine=deepspeed", "deepspeed.zero_stage=2", "compute.experts=loop"], True),
        (["logging.interval=1", "checkpoint.keep_last=7", "run.timeout_minutes=5", "data.index_cache=/tmp/x"], True),
        (["evaluation.interval=7", "resume=never", "run.time_limit=10:00"], True),
        (["data.blend=[{path: ./somewhere/, weight: null}]"], False),
        (["model.neuron_balance_coeff=0.5"], True),  # its loss is a constant where all neurons are kept
        (["model.neuron_balance_coeff=0.5", "model.neuron_balance_form=masked"], False),
        (["training.steps=21"], False),
        (["optimizer.lr=2e-3"], False),
        (["model.hidden_size=128"], False),
        (["model.moe_ffn_hidden_size=320"], False),
        (["compute.precision=bf16"], False),
        (["evaluation.sequences=8"], False),
    ],
)
def test_options_that_exclude_a_plain_run_as_baseline(tmp_path: Path, options: list[str], comparable: bool) -> None:
    write_run(tmp_path / "mone", None, 0.25, 1, 4.47)
    write_run(tmp_path / "plain", None, 1.0, 1, 4.5, options=options)
    found = compared(tmp_path)
    assert found.pop("plain") is None
    (comparison,) = found.values()
    assert (comparison is not None) == comparable
    if comparison is not None:
        assert comparison.difference.values == pytest.approx([-0.03])


def test_the_closest_baseline_is_taken_and_the_same_shards_by_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a", None, 1.0, 1, 4.6, options=["parallel.expert=2", "data.blend=[{path: data/x}]"])
    write_run(tmp_path / "runs/b", None, 1.0, 1, 4.5, options=["data.blend=[{path: data/x}]"])
    write_run(tmp_path / "runs/c", "sweep", 1.0, 2, 4.4, options=["data.blend=[{path: data/x}]"])
    write_run(tmp_path / "runs/mone", None, 0.25, 1, 4.47, options=[f"data.blend=[{{path: {tmp_path}/data/x/}}]"])
    comparison = compared(tmp_path / "runs")["mone"]
    assert comparison is not None
    assert comparison.base.name == "b"
    assert comparison.other_options == {}


def test_seeds_of_runs_made_one_by_one_make_a_point(tmp_path: Path) -> None:
    for seed, (plain, sparse) in enumerate(((4.5, 4.47), (4.6, 4.55), (4.4, 4.39)), start=1):
        write_run(tmp_path / f"plain-{seed}", None, 1.0, seed, plain, options=["model.moe_ffn_hidden_size=128"])
        # Wider, so that a token touches as many weights.
        write_run(tmp_path / f"wide-{seed}", None, 0.25, seed, sparse, options=["model.moe_ffn_hidden_size=256"])
    write_run(tmp_path / "plain-again", None, 1.0, 4, 9.0, options=["training.steps=40"])
    found = compared(tmp_path)
    assert list(found) == ["plain", "plain-again", "wide"]
    comparison = found["wide"]
    assert comparison is not None
    assert comparison.difference.values == pytest.approx([-0.03, -0.05, -0.01])
    assert comparison.other_options == {"model.moe_ffn_hidden_size": (256, 128)}
    assert finding(tmp_path).endswith(
        "0.0300 ± 0.0200 below that of the plain MoE (plain, 4.5000): lower in each of 3 seeds "
        "(95 % interval -0.0797 to +0.0197)."
    )


def test_a_repeated_run_stays_apart(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_run(tmp_path / name, None, 0.5, 1, 4.4)
    assert [point.name for point in group_runs(read_runs([tmp_path]))] == ["first", "second"]


def test_seeds_of_data_count_as_seeds(tmp_path: Path) -> None:
    for number, seed in enumerate(("null", "7"), start=1):
        for ratio in (1.0, 0.5):
            write_run(tmp_path / f"{ratio}-{number}", None, ratio, 1, 4.4, options=[f"data.seed={seed}"])
    found = compared(tmp_path)
    assert len(found) == 2
    comparison = found["0.5"]
    assert comparison is not None
    assert len(comparison.difference.values) == 2


@pytest.mark.parametrize(
    ("baseline", "base"),
    [
        ("runs/other", "other"),
        ("{optimizer.lr: 2e-3, model.activation_ratio: 1}", "other"),
    ],
)
def test_a_user_names_the_baseline(
    runs: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch, baseline: str, base: str
) -> None:
    monkeypatch.chdir(runs.parent)
    write_run(runs / "other", None, 1.0, 1, 4.25, options=["optimizer.lr=2e-3"])
    code, _, error = call_main(main, "runs/sweep", "runs/other", "--wandb", "disabled", "--baseline", baseline)
    assert code == 0, error
    page = (runs.parent / "report/index.html").read_text()
    row = next(line for line in page.splitlines() if "sweep: activation_ratio=" in line and "128 of 512" in line)
    assert f">{base}" in row.replace("<wbr>", "")
    assert ("+0.0400 ± 0.0200" if base != "other" else "+0.3100") in row


@pytest.mark.parametrize(
    "baseline", ["runs/nothing", "runs/sweep", "runs", "model.nothing=1", "model.activation_ratio=0.7", "{", "a=[", "=", "x"]
)
def test_an_invalid_baseline_is_refused(runs: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch, baseline: str) -> None:
    monkeypatch.chdir(runs.parent)
    code, _, error = call_main(main, "runs", "--wandb", "disabled", "--baseline", baseline)
    assert code == 2
    assert error.startswith("error: ")
    assert f"--baseline={baseline}" in error
    assert len(error.splitlines()) == 1


def write_evaluation(run: Path, nll: Sequence[float], name: str = "held_out") -> None:
    """Write what mone-evaluate records of a text with documents of 10, 20, ... tokens."""
    documents = [
        {"name": f"shards/{'ab'[number % 2]}/validation-00000:{number}", "tokens": 10 * number, "nll": loss * 10 * number}
        for number, loss in enumerate(nll, start=1)
    ]
    path = run / f"evaluations/{name}.json"
    path.parent.mkdir(exist_ok=True)
    scores = {each: {"value": 1.0} for each in ("nll_per_token", "perplexity", "bits_per_byte")}
    text = {"name": "shards", "sha256": "5a", "documents": documents, **scores}
    path.write_text(json.dumps({"format": "mone-evaluation-1", "text": text}))


def differences(folder: Path) -> list[str]:
    """The cells of the table of differences in a page."""
    (table,) = re.findall(r"<h2>Differences</h2>.*?<tbody>(.*?)</tbody>", (folder / "index.html").read_text(), re.DOTALL)
    return re.findall(r"<t[dh][^>]*>(.*?)</t", table)


def test_the_rate_is_chosen_by_a_seed_that_is_not_reported(tmp_path: Path, call_main: Call) -> None:
    for ratio, best in ((1.0, 0.002), (0.25, 0.004)):
        for rate in (0.002, 0.004):
            for seed in (0, 1, 2):
                # The rate that is best with seed 0 is worse with the others.
                loss = 4 + ratio / 10 + seed / 100 + (0.01 if (rate == best) != (seed == 0) else 0)
                folder = tmp_path / f"runs/{ratio:g},{rate:g},{seed}"
                write_run(folder, "sweep", ratio, seed, loss, options=[f"optimizer.lr={rate}"])
    options = ("--wandb", "disabled", "--output", str(tmp_path / "page"))
    code, out, _ = call_main(main, str(tmp_path / "runs"), *options, "--tune", "optimizer.lr", "--tuning-seed", "0")
    assert (code, out.splitlines()[0].split("  ")[1][:16]) == (0, "4 runs, 2 points")
    assert "-0.0750 ± 0.0000 over 2 seeds" not in out
    assert differences(tmp_path / "page")[:5] == [
        "activation_ratio=0.25",
        "activation_ratio=1",
        "2",
        "-0.0750",
        "-0.0750 to -0.0750",
    ]
    for wrong, said in (("9", "no complete run of the point of sweep/"), ("2", "")):
        code, _, error = call_main(main, str(tmp_path / "runs"), *options, "--tune", "optimizer.lr", "--tuning-seed", wrong)
        assert (code, said in error) == (2 if said else 0, True)
    code, _, error = call_main(main, str(tmp_path / "runs"), *options, "--tune", "optimizer.rate")
    assert (code, error.startswith("error: --tune=optimizer.rate:")) == (2, True)
    (tmp_path / "runs/1,0.004,0/status.json").write_text('{"state": "stopped"}')
    code, _, error = call_main(main, str(tmp_path / "runs"), *options, "--tune", "optimizer.lr")
    assert (code, "runs with this seed have not ended: sweep/1,0.004,0" in error) == (2, True)


def test_an_evaluation_takes_the_place_of_the_validation_loss(tmp_path: Path, call_main: Call) -> None:
    for ratio, loss in ((1.0, 4.0), (0.25, 4.02)):
        for seed in (1, 2, 3):
            write_run(tmp_path / f"runs/{ratio:g},{seed}", "sweep", ratio, seed, 9.0)
            write_evaluation(tmp_path / f"runs/{ratio:g},{seed}", [loss + seed / 100] * 4)
    options = ("--wandb", "disabled", "--output", str(tmp_path / "page"))
    code, out, _ = call_main(main, str(tmp_path / "runs"), *options, "--evaluation", "held_out", "--margin", "0.05")
    assert (code, "4.0400 nats per token" in out) == (0, True)
    found = differences(tmp_path / "page")
    assert found[3:6] == ["+0.0200", "+0.0200 to +0.0200", "+0.0200 to +0.0200"]
    assert found[8].startswith("yes")
    code, _, error = call_main(main, str(tmp_path / "runs"), *options, "--evaluation", "other")
    assert (code, "--evaluation=other: no run has it" in error) == (2, True)
    code, _, error = call_main(main, str(tmp_path / "runs"), *options, "--margin", "-1")
    assert (code, "--margin" in error) == (2, True)


def test_runs_of_an_earlier_version_lack_options_and_belong_to_the_same_point(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"runs/{seed}", "sweep", 0.5, seed, 3.0)
    config = OmegaConf.load(tmp_path / "runs/1/config.yaml")
    for section, name in (("model", "activation_ratio_curve"), ("model", "neuron_score"), ("init", "branch")):
        del config[section][name]  # type: ignore[index]
    OmegaConf.save(config, tmp_path / "runs/1/config.yaml")
    (point,) = group_runs(read_runs([tmp_path / "runs"]))
    assert [run.seed for run in point.runs] == ["1", "2"]


def test_records_give_the_same_report_as_the_runs(runs: Path, tmp_path: Path, call_main: Call) -> None:
    for run in read_runs([runs]):
        write_evaluation(run.folder, [run.validation_loss or 1.0] * 4)
    for run in read_runs([runs]):
        record = tmp_path / f"records/{run.name}.json"
        if run.state != "complete":
            with pytest.raises(ValueError, match="failed, not complete"):
                write_record(run, record)
        else:
            write_record(run, record)
            assert read_record(record).evaluations == run.evaluations
            for found in (run, read_record(record)):
                assert (found.tokens_per_second, found.undisturbed_speed) == (910.5, 918.0)
            assert run.evaluations["held_out"].sources == [("b", 1), ("a", 1), ("b", 1), ("a", 1)]
    shutil.rmtree(runs / "sweep/activation_ratio=0.25,seed=4")
    for folder in ("runs", "records"):
        options = ("--output", str(tmp_path / folder / "page"), "--wandb", "disabled", "--evaluation", "held_out")
        assert call_main(main, str(tmp_path / folder), *options)[0] == 0
    pages = [(tmp_path / folder / "page/index.html").read_text() for folder in ("runs", "records")]
    of_runs, of_records = (re.findall(r"<h2>(?:Points|Differences|Data)</h2>.*?</table>", page, re.DOTALL) for page in pages)
    assert len(of_runs) == 3
    assert of_runs == of_records
    assert "2 runs" in call_main(main, str(tmp_path / "records/wide"), "--wandb", "disabled", "--output", str(tmp_path))[1]
    (tmp_path / "records/wide/128.json").write_text('{\n"format": "mone-run-1"}')
    assert "left out" in call_main(main, str(tmp_path / "records"), "--wandb", "disabled", "--output", str(tmp_path))[2]


def test_the_sentence_for_each_kind_of_comparison(runs: Path, tmp_path: Path) -> None:
    assert finding(runs / "sweep").endswith(
        "0.0400 ± 0.0200 above that of the plain MoE (activation_ratio=1, 4.5000): higher in each of 3 seeds "
        "(95 % interval -0.0097 to +0.0897)."
    )
    # With a second sweep of one seed.
    said = "Compared with the plain MoE, the validation loss is lower in every seed at none of 2 points, higher in every "
    said += "seed at 1, undecided at 1 (the seeds disagree or differ, or there is one seed); the lowest is wide: "
    assert finding(runs).startswith(said)
    one = tmp_path / "one"
    write_run(one / "mone", None, 0.5, 1, 4.3)
    assert finding(one).startswith(
        "mone ends at a validation loss of 4.3000 nats per token in one seed, and there is no run "
    )
    write_run(one / "more", None, 0.25, 1, 4.2)
    assert finding(one).startswith(
        "more has the lowest validation loss of 2 points, 4.2000 nats per token in one seed, but "
    )
    write_run(one / "plain", None, 1.0, 1, 4.25)
    assert finding(one) == (
        "The validation loss is lower than that of the plain MoE at 1 of 2 points; the lowest is more, 0.0500 nats per "
        "token below the plain MoE; each point has one pair of runs, so any of these differences may be chance."
    )
    (one / "plain/status.json").write_text('{"state": "stopped"}')
    assert finding(one).endswith("but its baseline plain (the plain MoE) has no result yet.")
    (one / "plain/status.json").write_text('{"state": "complete"}')
    shutil.rmtree(one / "more")
    write_run(one / "mone2", None, 0.5, 2, 4.2)
    write_run(one / "plain2", None, 1.0, 2, 4.3)
    assert finding(one).endswith(
        "the 2 seeds disagree, so the sign of the difference is open (95 % interval -0.9780 to +0.9280)."
    )
    for seed, loss in ((1, 4.02), (2, 4.02), (3, 4.021), (4, 4.019), (5, 3.9995)):
        write_run(tmp_path / f"five/mone{seed}", None, 0.5, seed, loss)
        write_run(tmp_path / f"five/plain{seed}", None, 1.0, seed, 4.0)
    assert finding(tmp_path / "five").endswith(
        "higher on average over 5 seeds, but not in each (95 % interval +0.0045 to +0.0273)."
    )
    other = tmp_path / "other"
    write_run(other / "mone", None, 0.5, 1, 4.3)
    write_run(other / "plain", None, 1.0, 2, 4.2)
    assert finding(other).endswith("their seeds differ, so chance or the order of the data may cause the difference.")
    none = tmp_path / "none"
    write_run(none / "mone", None, 0.5, 1, 4.3, state="stopped")
    assert finding(none).startswith("No complete run has a validation loss")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The figures that charts draw, by file name; no files are written."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(charts, "save", lambda figure, path, dots: drawn.setdefault(path.stem, figure))
    yield drawn
    for figure in drawn.values():
        charts.plt.close(figure)


def test_maps_show_differences_where_there_are_any(runs: Path, figures: dict[str, Any]) -> None:
    points = group_runs(read_runs([runs / "sweep"]))
    for metric in charts.HEATMAPS:
        charts.draw_heatmap(Path(f"{metric.rpartition('/')[2]}.png"), points, metric)
    axes, bar = figures["overlap"].axes
    # Those of the plain MoE are all 1 and would make the others look alike.
    assert axes.images[0].get_clim() == pytest.approx((0.25, 0.27))
    assert [text.get_text() for text in axes.texts] == ["1", "1", "0.25", "0.27"]
    assert len(bar.get_yticks()) > 1
    assert len(figures["dead"].axes) == 1, "no colour bar for a single value"
    assert "0 everywhere" in figures["dead"].get_suptitle()
    assert len(figures["load_max"].axes) == 2
    assert "usage_entropy" not in figures, "which was not recorded"


def test_charts_show_points_with_values_and_whole_markers(runs: Path, figures: dict[str, Any]) -> None:
    write_run(runs / "queued", "queued", 0.5, 1, 4.4, "stopped")
    (runs / "queued/metrics.jsonl").unlink()
    name = r"_a $\x$ name"
    write_run(runs / name, None, 0.5, 1, 4.4)
    points = group_runs(read_runs([runs]))
    charts.draw_validation_by_ratio(Path("ratio.png"), points)
    charts.draw_validation_by_point(Path("point.png"), points)
    charts.draw_losses(Path("losses.png"), points, "all")
    legends = {
        stem: {text.get_text().strip() for text in figures[stem].axes[0].get_legend().get_texts()}
        for stem in ("ratio", "losses")
    }
    assert legends["ratio"] == {"sweep", "wide", name}
    assert name in legends["losses"]
    assert "queued" not in legends["losses"]
    bottom, top = figures["point"].axes[0].get_ylim()
    assert (bottom, top) == (4.6, -0.6), "half a row above the first and below the last"
    for figure in figures.values():
        figure.canvas.draw()  # an invalid formula would fail here
        assert figure.get_size_inches()[0] * 96 <= 400, "as wide as a phone, so that letters keep their size"


def test_many_points_make_a_page(tmp_path: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(charts, "MOST", 5)
    for number in range(9):
        write_run(tmp_path / f"runs/{number}", None, 0.5, 1, 4.4, options=[f"optimizer.weight_decay={number / 100}"])
    code, out, _ = call_main(main, "runs", "--wandb", "disabled")
    assert (code, "9 points" in out) == (0, True)
    page = (tmp_path / "report/index.html").read_text()
    assert "The charts show 5 of the 9 points" in page
    assert page.count("complete</td>") == 9


MEASURE = """<iframe src="report/index.html" width="{width}" height="900"></iframe><pre id="found"></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  document.getElementById("found").textContent = JSON.stringify({{
    sideways: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    broken: [...page.images].filter(image => !image.complete || image.naturalWidth == 0).length,
    shown: [...page.images].filter(image => image.getBoundingClientRect().width > 250).length,
    letters: parseFloat(getComputedStyle(page.querySelector("td")).fontSize),
    widest: Math.max(...[...page.images].map(image => image.getBoundingClientRect().width)),
    sharpness: Math.min(...[...page.images].map(image => image.naturalWidth / image.getBoundingClientRect().width)),
    cut: [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth + 1).length,
    signs: [...page.querySelectorAll(".sideways")].filter(sign => sign.offsetHeight > 0).length,
    titles: [...page.querySelectorAll("h2")].map(title => title.textContent),
  }});
}};
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [375, 1400])
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
    assert found["widest"] <= 480
    assert found["sharpness"] >= 1.9, "two image pixels for each CSS pixel"
    assert found["signs"] == found["cut"] >= 1, "each table that can be scrolled has a hint"
    assert found["titles"] == [
        *("Validation loss", "Training loss", "Experts and neurons"),
        *("Points", "Differences", "Settings that differ", "Data", "Runs"),
    ]


def test_damaged_files_are_named_and_other_runs_are_reported(
    tmp_path: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/mone"), None, 0.25, 1, 4.47)
    write_run(Path("runs/plain"), None, 1.0, 1, 4.5)
    named = {
        "status.json": '{"state": 5}',
        "config.yaml": "- a\n- b\n",
        "metrics.jsonl": None,
        "environment.json": "[",
        "figures/neuron_use.png": "no picture",
    }
    for name, text in named.items():
        folder = Path(f"runs/{name.partition('.')[0].replace('/', '_')}")
        write_run(folder, None, 0.5, 1, 4.4, options=[f"optimizer.weight_decay={len(name)}"])
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        if text is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_text(text)
    options = [
        "model.num_layers=0",
        "model.hidden_size=x",
        "run.seed=x",
        "run.name=[1]",
        "training.steps=many",
        "model.vocab_size=null",
    ]
    for number, option in enumerate([*options, "data.seed=x", "model.activation_ratio=.nan"]):
        write_run(Path(f"runs/option{number}"), None, 0.5, 1, 4.4, options=[option])
    write_run(Path("runs/<script>alert(1)<"), None, 0.5, 1, 4.4, options=["optimizer.lr=0.5"])
    with open("runs/mone/metrics.jsonl") as file:
        lines = file.read().splitlines()
    # The last validation loss is nan: an earlier one must not replace it.
    lines = [*lines[:3], "garbage", *lines[3:]]
    Path("runs/mone/metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_run(Path("runs/diverged"), None, 0.125, 1, math.nan)
    code, out, error = call_main(main, "runs", "--wandb", "disabled")
    assert (code, out.splitlines()[0].startswith("report/index.html  6 runs, 6 points")) == (0, True), out + error
    assert len(error.splitlines()) == 3 + 8 + 1
    page = Path("report/index.html").read_text()
    for problem in error.splitlines():
        assert f"<li>{html.escape(problem)}</li>" in page
    assert "runs/mone/metrics.jsonl: 1 line is damaged and skipped, first line 4" in error
    assert "<td>-0.0300</td>" in page
    assert "<script>alert" not in page
    assert "9.0000" not in page


def test_a_single_running_run_is_reported_too(tmp_path: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "one", "one", 0.5, 1, 4.0, "running")
    assert call_main(main, "one", "--wandb", "disabled", "--output", "out/here")[0] == 0
    assert "1 crashed" in (tmp_path / "out/here/index.html").read_text()


def test_the_same_run_twice_is_refused(runs: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    assert "9 runs" in call_main(main, "runs", "runs/sweep", "--wandb", "disabled")[1], "named twice is read once"
    shutil.copytree(runs / "sweep/activation_ratio=1,seed=2", runs / "sweep/copy")
    code, _, error = call_main(main, "runs", "--wandb", "disabled")
    assert code == 2
    assert "copy are the same run, seed 2" in error


def test_a_folder_without_runs_is_named(tmp_path: Path, call_main: Call) -> None:
    code, _, error = call_main(main, str(tmp_path))
    assert code == 2
    assert f"{tmp_path}: no run" in error
