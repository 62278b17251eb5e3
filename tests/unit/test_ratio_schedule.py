"""The ratio of neurons during training and by layer: `ModelConfig.at_step`."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone_model.config import RATIO_CURVES, ModelConfig, RatioPoint


def scheduled(points: list[tuple[int, float | None]], curve: str, **options: Any) -> ModelConfig:
    schedule = [RatioPoint(*point) for point in points]
    return ModelConfig(activation_ratio_schedule=schedule, activation_ratio_curve=curve, **options)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("steps", {1: 1.0, 99: 1.0, 100: 1.0, 199: 1.0, 200: 0.5, 299: 0.5, 300: 0.25, 10**6: 0.25}),
        ("linear", {1: 1.0, 100: 1.0, 150: 0.75, 200: 0.5, 250: 0.375, 300: 0.25, 10**6: 0.25}),
        (
            "cosine",
            {1: 1.0, 100: 1.0, 125: 0.75 + 0.25 * math.sqrt(0.5), 150: 0.75, 200: 0.5, 250: 0.375, 300: 0.25, 10**6: 0.25},
        ),
    ],
)
def test_the_ratio_of_each_step(curve: str, expected: dict[int, float]) -> None:
    model = scheduled([(100, 1.0), (200, 0.5), (300, None)], curve)
    found = {step: model.at_step(step) for step in expected}
    assert {step: at.activation_ratio for step, at in found.items()} == pytest.approx(expected)
    for at in found.values():
        assert at.activation_ratio_schedule == []
        assert at.active_neurons_by_layer == [max(1, math.floor(at.activation_ratio * 512 + 0.5))] * 4
        assert at.at_step(7) is at


def test_without_a_schedule_every_step_is_the_same() -> None:
    model = ModelConfig(layer_activation_ratios=[0.5, 0.25, 0.125, 0.125])
    assert model.at_step(1) is model
    assert model.active_neurons_by_layer == [256, 128, 64, 64]


def test_layers_with_ratios_of_their_own_follow_in_proportion() -> None:
    ratios = [0.5, 0.25, 0.125, 0.125]
    model = scheduled([(0, 1.0), (300, None)], "linear", layer_activation_ratios=ratios)
    # After a third of the schedule each layer drops a third of what it drops at the end.
    assert model.at_step(100).layer_activation_ratios == pytest.approx([1 - (1 - ratio) / 3 for ratio in ratios])
    assert model.at_step(100).activation_ratio == pytest.approx(0.75)
    assert model.at_step(0).active_neurons_by_layer == [512] * 4
    assert model.at_step(300).layer_activation_ratios == ratios, "not changed by rounding"


@given(
    curve=st.sampled_from(RATIO_CURVES),
    points_by_step=st.dictionaries(st.integers(0, 500), st.floats(0.25, 1), min_size=1, max_size=5),
    layers=st.booleans(),
)
def test_ratios_stay_between_those_of_the_points_around(curve: str, points_by_step: dict[int, float], layers: bool) -> None:
    points = sorted(points_by_step.items())
    points[-1] = (points[-1][0], 0.25)
    ratios = [0.5, 0.25, 0.125, 0.125] if layers else None
    model = scheduled(list(points), curve, layer_activation_ratios=ratios)
    for step in {1, 250, 501} | {near for start, _ in points for near in (start - 1, start, start + 1)}:
        earlier = [ratio for start, ratio in points if start <= step][-1:] or [points[0][1]]
        later = [ratio for start, ratio in points if start > step][:1] or earlier
        around = sorted(earlier + later)
        at = model.at_step(step)
        assert around[0] - 1e-9 <= at.activation_ratio <= around[1] + 1e-9
        assert sum(at.active_neurons_by_layer) / 4 == pytest.approx(512 * at.activation_ratio, abs=0.5)
