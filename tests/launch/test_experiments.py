"""Which runs of a plan are due, and which learning rate each point gets."""

import math
from typing import Any

import pytest

from launch.experiments import Experiment, Plan, best_rate, due, runs_of
from mone_common.console import UserError


def plan_of(**more: Any) -> Plan:
    """Two points with three rates, and an experiment that takes their rates."""
    first = Experiment(points={"plain": ["a=1"], "half": ["a={seed}"]}, learning_rates=[1e-3, 2e-3, 4e-3], seeds=[1, 2])
    second = Experiment(points={"plain": []}, learning_rate_of="first", learning_rate_factor=0.5, seeds=[1])
    return Plan(experiments={"first": first, "second": second, **more})


def trial(rate: str, point: str = "plain") -> str:
    return f"first/{point},lr={rate},seed=0"


def test_rates_are_tried_first_and_the_best_one_is_used_for_the_other_seeds() -> None:
    plan = plan_of()
    names = [run.name for run in due(plan, {}, ["first", "second"])]
    assert names == [trial(rate, point) for point in ("plain", "half") for rate in ("0.001", "0.002", "0.004")]
    losses = {trial("0.001"): 3.0, trial("0.002"): 2.0, trial("0.004"): 2.5}
    assert best_rate(plan, losses, "first", "plain") == 2e-3
    assert best_rate(plan, losses, "first", "half") is None
    assert best_rate(plan, losses, "second", "plain") == 1e-3
    names = [run.name for run in due(plan, losses, ["first", "second"])]
    assert names[3:] == ["first/plain,seed=1", "first/plain,seed=2", "second/plain,seed=1"]
    # Recorded runs are no longer due.
    assert [run.name for run in due(plan, losses | {"first/plain,seed=1": 2.0}, ["first"])][3:] == ["first/plain,seed=2"]


@pytest.mark.parametrize(("losses", "next_rate"), [((3.0, 2.0, 1.0), "0.008"), ((1.0, 2.0, 3.0), "0.0005")])
def test_an_extreme_best_rate_adds_its_neighbour(losses: tuple[float, ...], next_rate: str) -> None:
    plan = plan_of()
    found = dict(zip(map(trial, ("0.001", "0.002", "0.004")), losses, strict=True))
    assert best_rate(plan, found, "first", "plain") is None
    assert trial(next_rate) in [run.name for run in due(plan, found, ["first"])]
    worse, better = found | {trial(next_rate): 9.0}, found | {trial(next_rate): 0.5}
    assert best_rate(plan, worse, "first", "plain") == (4e-3 if next_rate == "0.008" else 1e-3)
    assert best_rate(plan, better, "first", "plain") is None


def test_a_rate_whose_loss_is_not_finite_is_not_chosen() -> None:
    losses = dict(zip(map(trial, ("0.001", "0.002", "0.004")), (math.nan, 2.0, 3.0), strict=True))
    assert best_rate(plan_of(), losses, "first", "plain") == 2e-3


def test_the_search_for_a_rate_ends() -> None:
    plan, losses = plan_of(), dict[str, float]()
    while trials := [run for run in due(plan, losses, ["first"]) if run.tuning and run.point == "plain"]:
        losses[trials[0].name] = -trials[0].rate
        assert len(losses) <= 6
    assert best_rate(plan, losses, "first", "plain") == 4e-3 * 8


def test_options_of_a_run() -> None:
    plan = plan_of(third=Experiment(overrides=["b=2"], points={"only": ["a={seed}"]}, learning_rates=[0.5], seeds=[7]))
    (run,) = runs_of(plan, {}, "third")
    assert (run.name, run.tuning) == ("third/only,seed=7", False)
    assert run.overrides(plan) == ["b=2", "a=7", "optimizer.lr=0.5", "run.seed=7", "logging.wandb_group=third"]


@pytest.mark.parametrize(
    ("experiment", "said"),
    [
        (Experiment(points={"a": []}), "experiments.x: give learning_rates or learning_rate_of"),
        (Experiment(points={"a": []}, learning_rates=[1.0], seeds=[0]), "0 is the tuning seed"),
        (
            Experiment(points={"a": []}, learning_rate_of="first"),
            "learning_rate_of: there is no point first/a",
        ),
        (Experiment(points={"a": []}, learning_rates=[1.0], contrasts=[["a", "b"]]), "contrasts: there is no point x/b"),
        (Experiment(points={"a": []}, learning_rates=[1.0], contrasts=[["a"]]), "must be a pair"),
        (Experiment(points={"a": []}, learning_rates=[1.0], interaction="y"), "interaction=y: no such experiment"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(experiment: Experiment, said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_of(x=experiment)
