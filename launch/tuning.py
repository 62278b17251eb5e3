"""Chooses an option, such as the learning rate, for each point by runs with a seed that is not reported.

    runs = choose(runs, "optimizer.lr", seed=0)

Runs that differ only in this option and in seeds belong together. The value with the lowest loss among those with the tuning
seed is chosen; the other runs with this value are kept.
"""

import dataclasses
import json
from collections.abc import Sequence

from launch.points import Run, essential
from launch.results import comparable, format_value


def choose(runs: Sequence[Run], option: str, *, seed: int) -> list[Run]:
    """The runs to report, with the option moved from `options` to `tuned`.

    ValueError if a point has no complete run with the tuning seed or one that has not ended, or no other run with the best
    value.
    """
    together: dict[str, list[Run]] = {}
    for run in runs:
        if option not in run.options:
            raise ValueError(f"--tune={option}: {run.name} has no such option")
        key = [run.group, {name: value for name, value in comparable(essential(run)).items() if name != option}]
        together.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(run)
    kept = []
    for members in together.values():
        trials = [run for run in members if run.seeds[0] == seed]
        losses = {run.options[option]: run.validation_loss for run in trials if run.state == "complete"}
        if unfinished := [run for run in trials if run.state not in ("complete", "failed")]:
            found = ", ".join(f"{run.name} ({run.state})" for run in unfinished)
            raise ValueError(f"--tuning-seed={seed}: runs with this seed have not ended: {found}; leave them out or wait")
        measured = {value: loss for value, loss in losses.items() if loss is not None}
        if not measured:
            raise ValueError(f"--tuning-seed={seed}: no complete run of the point of {members[0].name} has this seed")
        best = min(measured, key=lambda value: measured[value])
        chosen = [run for run in members if run.seeds[0] != seed and run.options[option] == best]
        if not chosen:
            raise ValueError(
                f"--tune={option}: {format_value(best)} is the best value of the point of {members[0].name}, "
                f"and no run with another seed than {seed} has it"
            )
        kept += [_without(run, option) for run in chosen]
    return kept


def _without(run: Run, option: str) -> Run:
    options = {name: value for name, value in run.options.items() if name != option}
    return dataclasses.replace(run, options=options, tuned={**run.tuned, option: run.options[option]})
