"""Dropped steps, and the limit of their number."""

import json
import math

import pytest
import torch

from train.config_sections import GuardConfig
from train.guards import Diverged, StepGuard

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_non_finite_step_is_dropped(loss: float, norm: float) -> None:
    guard = StepGuard(GuardConfig(), CPU)
    assert guard.accepts(1, 2.0, 1.0)
    assert not guard.accepts(2, loss, norm)
    assert "not finite" in guard.reason
    assert guard.accepts(3, 2.0, 1.0)
    assert guard.dropped == [2]


def test_the_budget_counts_the_last_steps_only() -> None:
    guard = StepGuard(GuardConfig(max_dropped=2, window=10), CPU)
    for step in (1, 2, 11):
        guard.accepts(step, math.nan, 1.0)
        guard.check_budget(step)
    guard.accepts(12, math.nan, 1.0)
    guard.check_budget(12)
    guard.accepts(13, math.nan, 1.0)
    with pytest.raises(Diverged, match=r"11, 12, 13 .*guard.max_dropped=2.*last checkpoint is intact"):
        guard.check_budget(13, since=9)
    with pytest.raises(Diverged, match="No step was applied since the checkpoint of step 10; .* move it away"):
        guard.check_budget(13, since=10)


def test_a_run_fails_if_its_last_window_was_dropped() -> None:
    guard = StepGuard(GuardConfig(max_dropped=9, window=3), CPU)
    guard.accepts(1, 2.0, 1.0)
    for step in (2, 3):
        guard.accepts(step, math.nan, 1.0)
    guard.check_progress(3, since=0)
    with pytest.raises(Diverged, match="all of the last 2 steps"):
        guard.check_progress(3, since=1)
    guard.accepts(4, math.nan, 1.0)
    with pytest.raises(Diverged, match="all of the last 3 steps"):
        guard.check_progress(4, since=0)
    guard.accepts(5, 2.0, 1.0)
    guard.check_progress(5, since=3)


def test_a_spike_is_dropped_and_not_counted_in_the_deviation() -> None:
    config = GuardConfig(spike_sigma=6.0, spike_window=20)
    guard = StepGuard(config, CPU)
    assert guard.accepts(0, 99.0, 99.0), "there are no spikes before there is a history"
    for step in range(1, 31):
        assert guard.accepts(step, 3.0 + 0.01 * (step % 5), 1.0 + 0.01 * (step % 3))
    for step in range(31, 40):
        assert not guard.accepts(step, 3.02, 2.0)
        assert "gradient norm 2 " in guard.reason
        assert not guard.accepts(step, 5.0, 1.0)
    assert guard.accepts(41, 2.0, 0.5), "a decrease is not a spike"
    again = StepGuard(config, CPU, json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state(), "the state survives a checkpoint exactly"


def test_without_spike_sigma_no_step_is_recorded() -> None:
    guard = StepGuard(GuardConfig(), CPU)
    for step in range(300):
        assert guard.accepts(step, 3.0, 1.0)
    assert guard.accepts(301, 1e9, 1e9)
    assert guard.state() == {"dropped": [], "recent": []}


def test_steps_dropped_during_a_save_are_not_in_the_checkpoint() -> None:
    guard = StepGuard(GuardConfig(), CPU)
    kept = guard.state()
    guard.accepts(1, math.nan, 1.0)
    assert kept["dropped"] == []
