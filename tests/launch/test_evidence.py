"""The recorded experiments: training from a plan in real processes, and the page made from records."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from launch.claims import Claim, verdict
from launch.evidence_page import correct, losses_of, read_records, update_page
from launch.experiments import Experiment, Plan, due, waiting_for
from launch.recorded import read_record, write_record
from launch.results import read_runs
from launch.statistics import contrast
from mone_common.console import UserError
from mone_common.run_records import read_metrics, read_status
from tests.conftest import ROOT
from tests.e2e.test_pretrain import OPTIONS
from tests.launch.test_report import write_evaluation, write_run

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_a_plan_trains_evaluates_and_records_each_run_once(tmp_path: Path, command: Command) -> None:
    random.seed(1)
    words = ["river", "mountain", "city", "people", "house", "water", "street", "winter", "summer", "garden"]
    texts = [" ".join(random.choices(words, k=120)) for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for module, *options in (
        ("data_prep.tokenizer_training", "vocab_size=300", "output=tokenizer"),
        ("data_prep.tokenize", "tokenizer=tokenizer", "output=shards", "validation_fraction=0.2"),
    ):
        assert command(module, "corpus.path=text.jsonl", *options).returncode == 0
    data = "data.blend=[{path: shards}]"
    tiny = [*(option for option in OPTIONS if not option.startswith("data.")), data, "parallel.expert=1", "training.steps=4"]
    tiny += ["model.vocab_size=null", "logging.wandb_mode=disabled"]
    points = '{plain: ["model.activation_ratio=1"], half: ["model.activation_ratio=0.5"]}'
    branch = "['init.source=runs/evidence/e/plain,seed={seed}', 'init.step=4', 'init.branch=true', 'training.steps=6']"
    plan = (
        f"experiments={{e: {{points: {points}, learning_rates: [0.001], seeds: [1], contrasts: [[half, plain]], "
        + "evaluations: {threshold_1_4: ['thresholds={run}/thresholds_0.25.json']}, "
        + "thresholds: [0.25], evaluated_seeds: [1]}, "
        + f"f: {{points: {{x: []}}, learning_rates: [0.001], seeds: [1], overrides: {branch}, after: e/plain}}}}",
        "only=[e]",
        f"overrides={json.dumps(tiny)}",
        "text=shards",
        "records=records",
        'evaluate=["stride=16"]',
        "calibrate=[]",
        "train=true",
    )
    first = command("launch.evidence", *plan, "jobs=2")
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in (tmp_path / "records/e").iterdir()) == ["half,seed=1.json", "plain,seed=1.json"]
    found = read_record(tmp_path / "records/e/half,seed=1.json")
    assert [found.options[name] for name in ("run.seed", "optimizer.lr", "model.activation_ratio")] == [1, 0.001, 0.5]
    assert set(found.evaluations) == {"trained", "threshold_1_4"}
    assert found.evaluations["trained"].sources == [("shards", len(found.evaluations["trained"].nll))]
    assert found.evaluations["trained"].nll != found.evaluations["threshold_1_4"].nll
    again = command("launch.evidence", *plan)
    assert (again.returncode, again.stdout) == (0, "")
    # A branch needs the checkpoint of its source, which a record does not have.
    record = (tmp_path / "records/e/plain,seed=1.json").read_bytes()
    shutil.rmtree(tmp_path / "runs/evidence/e/plain,seed=1")
    branched = command("launch.evidence", *plan, "only=[f]")
    assert branched.returncode == 0, branched.stderr
    assert "e/plain,seed=1: trained again for its checkpoint" in branched.stdout
    assert (tmp_path / "records/f/x,seed=1.json").exists()
    assert (tmp_path / "records/e/plain,seed=1.json").read_bytes() == record
    (tmp_path / "records/e/half,seed=1.json").unlink()
    shutil.rmtree(tmp_path / "runs/evidence/e/half,seed=1/evaluations")
    failing = command("launch.evidence", *plan, 'evaluate=["stride=0"]')
    assert failing.returncode == 1
    assert "e/half,seed=1: stride=0: must be at least 1 (runs/evidence/e/half,seed=1/log.txt)" in failing.stderr
    # A signal saves and stops the runs.
    longer = plan[2].replace("training.steps=4", "training.steps=100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.evidence", *plan[:2], longer, *plan[3:], "experiments.e.seeds=[2]"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    run = tmp_path / "runs/evidence/e/plain,seed=2"
    while not read_metrics(run):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert (process.returncode, "stopping: the runs save" in output) == (0, True)
    assert read_status(run)["state"] == "stopped"
    assert not (tmp_path / "records/e/plain,seed=2.json").exists()


BLOCKS = ("headline", "claims", "costs", "e", "f", "g")
PAGE = "before\n" + "between\n".join(f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in BLOCKS) + "after\n"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Records of two points over three seeds, and an experiment without records."""
    (tmp_path / "page.md").write_text(PAGE)
    for ratio, name in ((1.0, "plain"), (0.25, "quarter")):
        for seed in (1, 2, 3):
            folder = tmp_path / f"runs/{name},{seed}"
            write_run(folder, "e", ratio, seed, 9.0, options=["optimizer.lr=0.003"])
            with open(folder / "metrics.jsonl", "a") as metrics:
                names = ("dead", "usage_gini", "gate_magnitude", "threshold")
                use = {f"neuron/{metric}": number / 10 for number, metric in enumerate(names, 1)}
                metrics.write(json.dumps({"step": 20} | use) + "\n")
            loss = 4 + (0.02 + seed / 1000 if name == "quarter" else 0)
            for evaluation in ("trained", "ratio_1", "ratio_1_2", "ratio_1_4", "ratio_1_8", "threshold_1_4"):
                write_evaluation(folder, [loss] * 4, evaluation)
            write_record(read_runs([folder])[0], tmp_path / f"records/e/{name},seed={seed}.json")
            write_evaluation(folder, [loss + (0.1 if name == "quarter" else 0)] * 4, "trained")
            write_record(read_runs([folder])[0], tmp_path / f"records/g/{name},seed={seed}.json")
    shutil.copy(tmp_path / "records/e/plain,seed=1.json", tmp_path / "records/e/plain,lr=0.001,seed=0.json")
    e = Experiment(
        points={"plain": [], "quarter": []},
        learning_rates=[1e-3, 2e-3],
        seeds=[1, 2, 3],
        evaluations={"ratio_1_4": [], "threshold_1_4": []},
        evaluated_seeds=[1, 2, 3],
        contrasts=[["quarter", "plain"], ["plain", "quarter"]],
    )
    return Plan(
        experiments={
            "e": e,
            "f": Experiment(points={"x": []}, learning_rate_of="e/plain", seeds=[1, 2], contrasts=[["x", "e/plain"]]),
            "g": dataclasses.replace(
                e, evaluations={}, seeds=[1, 2, 3, 4], contrasts=[["quarter", "plain"]], interaction="e"
            ),
        },
        primary=[["e/quarter", "e/plain"], ["f/x", "e/plain"]],
        margin=0.05,
        claims=[
            Claim("enough", ["e/quarter", "e/plain"]),
            Claim("worse", ["g/quarter", "g/plain"]),
            Claim("by threshold", ["e/quarter@threshold_1_4", "e/quarter"], says="better"),
            Claim("nothing", ["f/x", "e/plain"]),
            Claim("afterwards", ["e/quarter", "e/plain@ratio_1_4"], says="better"),
        ],
    )


def test_the_page_has_tables_and_figures_of_the_records(plan: Plan, tmp_path: Path) -> None:
    update_page(plan, tmp_path / "records", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "No reported run yet." in text
    of_e = text.partition("<!-- e -->")[2].partition("<!-- end e -->")[0].splitlines()
    (row,) = [line for line in of_e if line.startswith("| quarter | plain |")]
    cells = row.strip("| ").split(" | ")
    # Mean 0.022 of 0.021, 0.022 and 0.023; 4.303 standard errors of 0.001 / sqrt(3).
    assert cells[2:5] == ["3", "+0.0220", "+0.0195 to +0.0245"]
    assert float(cells[7]) == pytest.approx(2 * float(cells[6]), rel=0.1), "Holm's correction counts both primary contrasts"
    (other,) = [line for line in of_e if line.startswith("| plain | quarter |")]
    assert other.strip("| ").split(" | ")[7] == "-"
    assert cells[8].startswith("yes")
    assert [line for line in of_e if line.startswith("| quarter, trained at 0.25 |")] == [
        "| quarter, trained at 0.25 | the K best | 3 | 4.0220 | 4.0220 | 4.0220 | 4.0220 |",
        "| quarter, trained at 0.25 | by threshold | 3 | - | - | 4.0220 | - |",
    ]
    assert text.count("Not complete: plain, quarter.") == 1, "of g, which has no seed 4"
    assert [line for line in of_e if line.startswith("Commits of the code: ")]
    assert "| quarter | 0.1 | 0.2 | 0.3 | 0.4 |" in of_e
    assert not [line for line in of_e if line.startswith("| plain | 0.1 |")]
    (excess,) = [line for line in lines if line.startswith("| quarter - plain | quarter - plain of e |")]
    assert excess.strip("| ").split(" | ")[2:5] == ["3", "+0.1000", "+0.1000 to +0.1000"]
    rows = [line.strip("| ").split(" | ") for line in lines if line.count("|") == 7]
    claims = {cells[0]: cells[2:] for cells in rows}
    assert claims["enough"] == ["+0.0220", "+0.0195 to +0.0245", "3", "holds: higher loss, within ±0.05"]
    assert claims["worse"] == ["+0.1220", "+0.1195 to +0.1245", "3", "3 of 4 seeds"]
    assert claims["by threshold"] == ["+0.0000", "+0.0000 to +0.0000", "3", "not decided: within ±0.05"]
    assert claims["nothing"] == ["", "", "", "not yet measured"]
    difference = "+0.022 nats per token with 0.25 of the neurons (+0.020 to +0.024, 3 of 3 seeds)"
    of_claims = "Primary claims (2): holds 1, without all seeds 1."
    assert f"**Loss minus that of the plain MoE with the same weights: {difference}. {of_claims}**" in lines
    assert (tmp_path / "images/evidence_costs.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "images/evidence_e.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "images/evidence_claims.png").read_bytes().startswith(b"\x89PNG")
    assert "![Difference and verdict of each claim](images/evidence_claims.png)" in lines
    update_page(plan, tmp_path / "records", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == text


def test_runs_of_different_processors_are_not_paired(plan: Plan, tmp_path: Path) -> None:
    record = tmp_path / "records/e/plain,seed=2.json"
    change(record, environment={"processor": "another one"})
    update_page(plan, tmp_path / "records", tmp_path / "page.md")
    (row,) = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| enough |")]
    assert row.strip("| ").split(" | ")[2] == "+0.0220"
    assert row.strip("| ").split(" | ")[4] == "2"


def change(record: Path, **content: Any) -> None:
    text = json.dumps(json.loads(record.read_text()) | content, separators=(",\n", ": "))
    record.write_text(text.replace("{", "{\n", 1))


def test_runs_scored_on_other_documents_are_not_paired(plan: Plan, tmp_path: Path) -> None:
    for name in ("plain", "quarter"):
        record = tmp_path / f"records/e/{name},seed=2.json"
        evaluations = json.loads(record.read_text())["evaluations"]
        evaluations["trained"]["sha256"] = "other"
        evaluations["trained"]["tokens"] = evaluations["trained"]["tokens"][1:]
        evaluations["trained"]["nll"] = evaluations["trained"]["nll"][1:]
        change(record, evaluations=evaluations)
    update_page(plan, tmp_path / "records", tmp_path / "page.md")
    (row,) = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| enough |")]
    assert row.strip("| ").split(" | ")[2:] == ["+0.0220", "+0.0093 to +0.0347", "2", "2 of 3 seeds"]


def test_records_that_do_not_fit_the_plan_are_refused(plan: Plan, tmp_path: Path) -> None:
    plan.experiments["e"].points["plain"].append("model.activation_ratio=0.5")
    with pytest.raises(UserError, match=r"plain,seed=1.json: model.activation_ratio=1.0, but the plan has 0.5; move"):
        update_page(plan, tmp_path / "records", tmp_path / "page.md")
    plan.experiments["e"].points["plain"].clear()
    (tmp_path / "records/g/plain,seed=2.json").write_text("<<<<<<< HEAD\n")
    with pytest.raises(UserError, match=r"plain,seed=2.json: not the record of a run"):
        update_page(plan, tmp_path / "records", tmp_path / "page.md")


def test_a_run_waits_for_its_source_and_is_due_until_its_evaluations_are_recorded(plan: Plan, tmp_path: Path) -> None:
    branch = dataclasses.replace(plan.experiments["f"], learning_rate_of=None, learning_rates=[0.001], after="e/plain")
    plan.experiments["f"] = dataclasses.replace(branch, seeds=[1, 4])
    plan.experiments["e"].learning_rates = [0.003]

    def names() -> list[str]:
        return [run.name for run in due(plan, losses_of(plan, read_records(tmp_path / "records")), ["e", "f"])]

    assert names() == ["f/x,seed=1"]
    losses = losses_of(plan, read_records(tmp_path / "records"))
    assert waiting_for(plan, losses, ["e", "f"]) == {"e/plain,seed=4": ["f/x,seed=4"]}
    record = tmp_path / "records/e/plain,seed=1.json"
    evaluations = json.loads(record.read_text())["evaluations"]
    del evaluations["ratio_1_4"]
    change(record, evaluations=evaluations)
    assert names() == ["e/plain,seed=1"]
    update_page(plan, tmp_path / "records", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Not complete: plain." in text
    assert "| plain, trained at 1 | the K best | 2 |" in text


@pytest.mark.parametrize(
    ("says", "differences", "expected"),
    [
        ("equal", [-0.02, -0.021, -0.019], "holds: lower loss, within ±0.03"),
        ("better", [-0.02, -0.021, -0.019], "holds: lower loss, within ±0.03"),
        ("equal", [-0.05, -0.051, -0.049], "holds: lower loss"),
        ("better", [-0.05, -0.051, -0.049], "holds: lower loss"),
        ("equal", [0.02, 0.021, 0.019], "holds: higher loss, within ±0.03"),
        ("better", [0.02, 0.021, 0.019], "does not hold: higher loss, within ±0.03"),
        ("equal", [0.0, -0.001, 0.001], "holds: within ±0.03"),
        ("better", [0.0, -0.001, 0.001], "not decided: within ±0.03"),
        ("equal", [0.05, 0.051, 0.049], "does not hold: higher loss"),
        ("better", [0.05, 0.051, 0.049], "does not hold: higher loss"),
        ("equal", [0.025, 0.03, 0.035], "not decided: higher loss"),
        ("equal", [0.06, -0.06, 0.0], "not decided"),
        ("better", [0.06, -0.06, 0.0], "not decided"),
        ("better", [-0.06, -0.001, -0.03], "not decided"),
    ],
)
def test_verdicts(says: str, differences: list[float], expected: str) -> None:
    test = contrast(differences, margin=0.03)
    assert verdict(says, test, planned=3) == expected
    assert verdict(says, test, planned=5) == "3 of 5 seeds"


def test_verdicts_on_primary_contrasts_use_corrected_p_values() -> None:
    names = ("a", "b", "c")
    experiment = Experiment(points=dict.fromkeys(("base", *names), []), learning_rates=[1.0])
    experiment.contrasts = [[name, "base"] for name in names]
    plan = Plan(experiments={"e": experiment}, primary=[[f"e/{name}", "e/base"] for name in names])
    test = contrast([0.019, 0.02, 0.024], margin=0.03)
    tests = {(f"e/{name}", "e/base"): test for name in names[:2]}
    tests["e/a", "e/b"] = test
    found = correct(plan, tests)
    for name in ("p", "p_equivalent", "p_above"):
        # Of three primary contrasts two were tested.
        corrected, alone = getattr(found["e/a", "e/base"], name), getattr(test, name)
        assert corrected == pytest.approx(min(1.0, 3 * alone))
    assert found["e/a", "e/b"] == test


def test_a_baseline_without_runs_of_the_seeds_is_not_shown(plan: Plan, tmp_path: Path) -> None:
    plan.experiments["e"].seeds = [3]
    plan.experiments["f"].learning_rate_of, plan.experiments["f"].learning_rates = None, [0.003]
    shutil.copy(tmp_path / "records/e/quarter,seed=1.json", tmp_path / "records/f.json")
    (tmp_path / "records/f").mkdir()
    (tmp_path / "records/f.json").rename(tmp_path / "records/f/x,seed=1.json")
    update_page(plan, tmp_path / "records", tmp_path / "page.md")
    of_f = (tmp_path / "page.md").read_text().partition("<!-- f -->")[2].partition("<!-- end f -->")[0]
    assert ("| x |" in of_f, "e/plain" in of_f) == (True, False)


def test_claims_of_unknown_points_are_refused() -> None:
    experiments = {"e": Experiment(points={"x": []}, learning_rates=[1.0])}
    with pytest.raises(UserError, match="claims: same: there is no point e/y"):
        Plan(experiments=experiments, claims=[Claim("same", ["e/x@trained", "e/y"])])
    with pytest.raises(UserError, match="claims: same: e/x has no evaluation ratio_1_2"):
        Plan(experiments=experiments, claims=[Claim("same", ["e/x@ratio_1_2", "e/x"])])
    with pytest.raises(UserError, match="primary: .* is no contrast of an experiment"):
        Plan(experiments=experiments, primary=[["e/x", "e/y"]])
    experiments["e"].after, experiments["e"].learning_rates = "e/x", [1.0, 2.0]
    with pytest.raises(UserError, match="experiments.e.after: the runs that choose a rate"):
        Plan(experiments=experiments)
    with pytest.raises(UserError, match="says=worse: choose from equal, better"):
        Claim("same", ["e/x", "e/y"], says="worse")


def test_a_page_without_a_place_for_an_experiment_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- e -->\n<!-- end e -->\n")
    with pytest.raises(UserError, match="has no place for f"):
        update_page(plan, tmp_path / "records", tmp_path / "page.md")


def test_the_published_page_agrees_with_the_records(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs/evidence.md", tmp_path / "evidence.md")
    loaded = OmegaConf.load(ROOT / "configs/evidence.yaml")
    assert isinstance(loaded, DictConfig)
    plan = OmegaConf.merge(
        OmegaConf.structured(Plan), {name: loaded[name] for name in ("margin", "primary", "claims", "experiments")}
    )
    shutil.copy(ROOT / "README.md", tmp_path)
    options = OmegaConf.to_object(plan)
    assert isinstance(options, Plan)
    update_page(options, ROOT / "docs/evidence/runs", tmp_path / "evidence.md", readme=tmp_path / "README.md")
    assert (tmp_path / "evidence.md").read_text() == (ROOT / "docs/evidence.md").read_text(), "run `make evidence`"
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make evidence`"
