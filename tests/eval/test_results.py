"""Records of evaluations in the report of runs, and the help of the commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import report
from mone_eval import evaluate, fetch_task_data
from mone_eval.results import environment, read_result, write_result
from tests.launch.test_report import write_run

Call = Callable[..., tuple[int, str, str]]


def record(bits: float) -> dict[str, Any]:
    score = {"value": bits, "low": bits - 0.1, "high": bits + 0.1}
    text = {"name": "held out", "nll_per_token": score, "perplexity": score, "bits_per_byte": score}
    tasks = {
        "mmlu": {"metrics": {"acc": {"value": 0.25, "stderr": 0.01}}, "shown": True},
        "mmlu_anatomy": {"metrics": {"acc": {"value": 0.5, "stderr": 0.1}}, "shown": False},
    }
    model = {"activation_ratio": 0.25, "source": "runs/a/checkpoints/step-20"}
    return {**environment({}), "model": model, "text": text, "tasks": {"results": tasks}}


def test_a_report_has_the_evaluations_of_its_runs(tmp_path: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        write_run(tmp_path / f"runs/{name}", None, 0.25, seed, 4.5)
    path = tmp_path / "runs/a/evaluations/first.json"
    write_result(path, record(1.25))
    assert read_result(path)["text"]["bits_per_byte"]["value"] == 1.25
    (tmp_path / "runs/b/evaluations").mkdir()
    (tmp_path / "runs/b/evaluations/other.json").write_text("{}")
    code, _, errors = call_main(report.main, "runs", "--wandb", "disabled")
    assert code == 0, errors
    assert "runs/b/evaluations/other.json: not a result of mone-evaluate" in errors
    page = (tmp_path / "report/index.html").read_text()
    for cell in ("first", "step-20", "held out", "1.2500 [1.1500, 1.3500]", "mmlu", "0.2500 ± 0.0100"):
        assert f"{cell}</t" in page, cell
    assert "mmlu_anatomy" not in page


@pytest.mark.parametrize(
    ("main", "options"),
    [(evaluate.main, evaluate.EvaluateConfig), (fetch_task_data.main, fetch_task_data.FetchTaskDataConfig)],
)
def test_help_explains_every_option(main: Callable[[], None], options: Any, call_main: Call) -> None:
    code, output, _ = call_main(main, "--help")
    assert code == 0
    for name in options.__dataclass_fields__:
        assert name in output
