"""Plans of experiments: points, learning rates, seeds and contrasts, and which runs are due.

plan = Plan(experiments={"equal_total": Experiment(points={"plain": ["model.activation_ratio=1"]}, ...)})
due(plan, losses, ["equal_total"])  # the runs whose settings are known and that have no result yet
best_rate(plan, losses, "equal_total", "plain")

A learning rate is chosen for each point by runs with the tuning seed, which is not reported.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from launch.claims import Claim
from mone_common.console import UserError

TRAINED = "trained"
"""Name of the evaluation that selects neurons as in training."""
Pair = tuple[str, str]
"""A point and its baseline, each EXPERIMENT/POINT or EXPERIMENT/POINT@EVALUATION."""
FACTOR = 2.0
"""Factor between learning rates; the next rate is tried if the best one is the lowest or highest."""
MOST_RATES = 6


@dataclass
class Experiment:
    """One question, and the runs that answer it."""

    question: str = ""
    """What is asked."""
    overrides: list[str] = field(default_factory=list)
    """Options of all points; {seed} stands for the seed."""
    points: dict[str, list[str]] = field(default_factory=dict)
    """Options of each point."""
    learning_rates: list[float] = field(default_factory=list)
    """Peak learning rates to try with the tuning seed; one: it is used without a trial; empty: learning_rate_of."""
    learning_rate_of: str | None = None
    """Where the rate comes from: EXPERIMENT/POINT, or EXPERIMENT for its point of the same name."""
    learning_rate_factor: float = 1.0
    """Multiplies the rate of learning_rate_of."""
    after: str | None = None
    """EXPERIMENT/POINT: a run starts when that point's run with the same seed has a record."""
    seeds: list[int] = field(default_factory=list)
    """Seeds that are reported."""
    contrasts: list[list[str]] = field(default_factory=list)
    """Pairs [point, baseline], also EXPERIMENT/POINT of other experiments."""
    interaction: str | None = None
    """An experiment with the same points: the difference of the differences."""
    evaluations: dict[str, list[str]] = field(default_factory=dict)
    """Further options of mone-evaluate by the name of an evaluation; `trained`, without options, always takes place. {run}
    stands for the folder of the run."""
    thresholds: list[float] = field(default_factory=list)
    """Shares of neurons for which mone-calibrate writes {run}/thresholds_SHARE.json before these evaluations."""
    evaluated_seeds: list[int] = field(default_factory=list)
    """Seeds with these evaluations."""


@dataclass
class Plan:
    """All experiments, in the order in which they run."""

    tuning_seed: int = 0
    """Seed of the runs that choose a learning rate."""
    margin: float = 0.03
    """Two points are equivalent if their losses differ by less than this, nats per token."""
    primary: list[list[str]] = field(default_factory=list)
    """Contrasts whose p values get Holm's correction together."""
    experiments: dict[str, Experiment] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    """Claims whose verdicts are the first table."""

    def __post_init__(self) -> None:
        for claim in self.claims:
            for end in claim.contrast:
                point, _, evaluation = end.partition("@")
                self._check_point("claims", claim.claim, point)
                evaluations = self.experiments[point.partition("/")[0]].evaluations
                if evaluation and evaluation != TRAINED and evaluation not in evaluations:
                    raise UserError(f"claims: {claim.claim}: {point} has no evaluation {evaluation}")
        for pair in self.primary:
            if pair not in [list(found) for name in self.experiments for found in self.contrasts_of(name)]:
                raise UserError(f"primary: {pair} is no contrast of an experiment")
        for name, experiment in self.experiments.items():
            if bool(experiment.learning_rates) == (experiment.learning_rate_of is not None):
                raise UserError(f"experiments.{name}: give learning_rates or learning_rate_of")
            if self.tuning_seed in experiment.seeds:
                raise UserError(f"experiments.{name}.seeds={experiment.seeds}: {self.tuning_seed} is the tuning seed")
            if experiment.learning_rate_of is not None:
                for point in experiment.points:
                    self._check_point(name, "learning_rate_of", _rate_of(experiment, point))
            for pair in experiment.contrasts:
                if len(pair) != 2:
                    raise UserError(f"experiments.{name}.contrasts: {pair} must be a pair, [point, baseline]")
                for point in pair:
                    self._check_point(name, "contrasts", full_name(name, point))
            if experiment.after is not None:
                self._check_point(name, "after", experiment.after)
                if len(experiment.learning_rates) > 1:
                    raise UserError(f"experiments.{name}.after: the runs that choose a rate have no run to start after")
            if experiment.interaction is not None and experiment.interaction not in self.experiments:
                raise UserError(f"experiments.{name}.interaction={experiment.interaction}: no such experiment")

    def contrasts_of(self, name: str) -> list[Pair]:
        """The contrasts of an experiment, each end EXPERIMENT/POINT."""
        return [(full_name(name, point), full_name(name, base)) for point, base in self.experiments[name].contrasts]

    def evaluations_of(self, name: str) -> set[str]:
        """Names of the evaluations that the record of a run has; name: of `Planned`."""
        experiment, seed = self.experiments.get(name.partition("/")[0]), name.rpartition("seed=")[2]
        if experiment is None or ",lr=" in name or seed not in map(str, experiment.evaluated_seeds):
            return {TRAINED}
        return {TRAINED, *experiment.evaluations}

    def seeds_of(self, pair: Pair) -> set[int]:
        """The seeds that both ends of a contrast are planned to have; an end may be EXPERIMENT/POINT@EVALUATION."""
        seeds = []
        for end in pair:
            point, _, evaluation = end.partition("@")
            experiment = self.experiments[point.partition("/")[0]]
            every = evaluation in ("", TRAINED)
            seeds.append(set(experiment.seeds if every else experiment.evaluated_seeds))
        return set.intersection(*seeds)

    def _check_point(self, name: str, option: str, point: str) -> None:
        experiment, _, its = point.partition("/")
        if its not in getattr(self.experiments.get(experiment), "points", {}):
            where = f"claims: {option}" if name == "claims" else f"experiments.{name}.{option}"
            raise UserError(f"{where}: there is no point {point}")


@dataclass(frozen=True)
class Planned:
    """A run of the plan."""

    experiment: str
    point: str
    seed: int
    rate: float
    tuning: bool
    """Whether the run is one of those that choose the learning rate."""

    @property
    def name(self) -> str:
        """Name of its folder and record: equal_total/plain,seed=1; that of a tuning run has the rate."""
        rate = f",lr={self.rate:g}" if self.tuning else ""
        return f"{self.experiment}/{self.point}{rate},seed={self.seed}"

    def overrides(self, plan: Plan) -> list[str]:
        """Options of mone-pretrain."""
        experiment = plan.experiments[self.experiment]
        own = [f"optimizer.lr={self.rate:g}", f"run.seed={self.seed}", f"logging.wandb_group={self.experiment}"]
        overrides = [*experiment.overrides, *experiment.points[self.point], *own]
        return [option.replace("{seed}", str(self.seed)) for option in overrides]


def full_name(experiment: str, point: str) -> str:
    """EXPERIMENT/POINT of a point that an experiment names."""
    return point if "/" in point else f"{experiment}/{point}"


def _rate_of(experiment: Experiment, point: str) -> str:
    assert experiment.learning_rate_of is not None
    source = experiment.learning_rate_of
    return source if "/" in source else f"{source}/{point}"


def best_rate(plan: Plan, losses: Mapping[str, float], experiment: str, point: str) -> float | None:
    """The learning rate of a point; None while it is not known. losses: by `Planned.name`."""
    own = plan.experiments[experiment]
    if own.learning_rate_of is not None:
        found = best_rate(plan, losses, *_rate_of(own, point).split("/"))
        return None if found is None else found * own.learning_rate_factor
    if len(own.learning_rates) == 1:
        return own.learning_rates[0]
    trials = _tuning_runs(plan, losses, experiment, point)
    known = all(run.name in losses for run in trials)
    return min(trials, key=lambda run: _finite(losses[run.name])).rate if known else None


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _tuning_runs(plan: Plan, losses: Mapping[str, float], experiment: str, point: str) -> list[Planned]:
    """The runs that choose the rate, as far as they are known; a neighbour is added while the best rate is an extreme."""
    rates = sorted(plan.experiments[experiment].learning_rates)
    if len(rates) < 2:
        return []

    def run(rate: float) -> Planned:
        return Planned(experiment, point, plan.tuning_seed, rate, tuning=True)

    while len(rates) < MOST_RATES and all(run(rate).name in losses for rate in rates):
        best = min(rates, key=lambda rate: _finite(losses[run(rate).name]))
        if best == rates[-1]:
            rates.append(best * FACTOR)
        elif best == rates[0]:
            rates.insert(0, best / FACTOR)
        else:
            break
    return list(map(run, rates))


def runs_of(plan: Plan, losses: Mapping[str, float], experiment: str) -> list[Planned]:
    """The runs of an experiment whose settings are known, those that choose learning rates first."""
    own = plan.experiments[experiment]
    tuning = [run for point in own.points for run in _tuning_runs(plan, losses, experiment, point)]
    rates = {point: best_rate(plan, losses, experiment, point) for point in own.points}
    # By seed: an interruption leaves as many complete pairs as possible.
    return tuning + [
        Planned(experiment, point, seed, rate, tuning=False)
        for seed in own.seeds
        for point, rate in rates.items()
        if rate is not None
    ]


def due(plan: Plan, losses: Mapping[str, float], experiments: list[str]) -> list[Planned]:
    """The runs of these experiments whose settings are known and that can start and have no result, in order."""
    return [run for run in _unrecorded(plan, losses, experiments) if source_of(plan, run) in {None, *losses}]


def waiting_for(plan: Plan, losses: Mapping[str, float], experiments: list[str]) -> dict[str, list[str]]:
    """By the run that must have a record first (`after`): the names of the runs of these experiments that wait for it."""
    waiting: dict[str, list[str]] = {}
    for run in _unrecorded(plan, losses, experiments):
        if (source := source_of(plan, run)) is not None and source not in losses:
            waiting.setdefault(source, []).append(run.name)
    return waiting


def _unrecorded(plan: Plan, losses: Mapping[str, float], experiments: list[str]) -> list[Planned]:
    return [run for name in experiments for run in runs_of(plan, losses, name) if run.name not in losses]


def source_of(plan: Plan, run: Planned) -> str | None:
    """Name of the run that this one starts from (`after`)."""
    after = plan.experiments[run.experiment].after
    return None if after is None else f"{after},seed={run.seed}"
