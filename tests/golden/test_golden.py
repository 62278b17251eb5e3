"""The mathematics is what it was: losses and gradient norms of fixed runs equal those in losses.json."""

from typing import Any

import pytest

from tests.golden.runs import RUNS, differences, read_record, train


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("name", "model"), RUNS.items(), ids=RUNS)
def test_losses_are_those_recorded(name: str, model: dict[str, Any]) -> None:
    different = differences({name: train(model)}, {name: read_record()[name]})
    assert not different, "\n".join([*different, "if this is meant: python -m tests.golden"])


def test_the_record_has_every_run_and_no_other() -> None:
    assert read_record().keys() == RUNS.keys()


def test_a_difference_is_told() -> None:
    recorded = {"run": {"loss": [4.0, 3.0]}, "gone": {"loss": [1.0]}}
    assert differences({"run": {"loss": [4.0, 3.001]}}, recorded) == [
        "gone: no such run",
        "run: loss of step 2: 3 -> 3.001 (+3.3e-04)",
    ]
    assert differences({"run": {"loss": [float("nan"), 3.0]}}, {"run": recorded["run"]}) != []
