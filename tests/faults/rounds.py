"""Kill -9 at random times, and compare the restarted run with an undisturbed one."""

import contextlib
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.jobs import STEPS, Job, checkpoints, differences, run_to_end


@dataclass(frozen=True)
class Round:
    """The parameters of one round."""

    victims: str
    """rank 0, rank 1 or all."""
    moment: str
    """start, step or save."""
    step: int
    """Kill after the record of this step; for a save: during the first save after it."""
    delay: float
    """Delay in seconds."""
    async_save: bool
    """Whether checkpoints are written in the background."""

    def __str__(self) -> str:
        when = {
            "start": "starting",
            "step": f"after step {self.step}" if self.step else "starting",
            "save": f"in the first save after step {self.step}",
        }[self.moment]
        return f"{when} + {self.delay:.2f} s, {'async' if self.async_save else 'sync'} saves"


@dataclass(frozen=True)
class Outcome:
    """The result of a round."""

    round: Round
    reached: int
    """Last step recorded before the kill."""
    resumed_from: int
    """Newest checkpoint after the kill; 0: none."""
    torn: bool
    """Whether the kill left an incomplete checkpoint."""
    problem: str
    """Differences between the restarted and the undisturbed run."""

    def row(self, number: int) -> str:
        """A row of the table."""
        lost, torn = self.reached - self.resumed_from, "yes" if self.torn else "no"
        moment = f"{self.round}; at step {self.reached}"
        return f"{number:>5}  {self.round.victims:<7}  {moment:<66}  {torn:<9}  {lost:>10}  {self.problem or 'equal'}"


HEADER = f"{'round':>5}  {'killed':<7}  {'moment':<66}  {'torn save':<9}  {'steps lost':>10}  equal to undisturbed"


def draw(generator: random.Random, number: int) -> Round:
    """A round. Every other round kills during a save, and every other of these during an asynchronous save."""
    moment = "save" if number % 2 == 0 else generator.choice(["start", "step", "step", "step"])
    delay = {"start": 12.0, "step": 0.6, "save": 0.25}[moment] * generator.random()
    victims = generator.choice(["rank 0", "rank 1", "all"])
    return Round(victims, moment, generator.randrange(STEPS - 1), delay, async_save=number % 4 < 2)


def play(folder: Path, name: str, hurt: Round) -> Outcome:
    """Kill a run, start it again, and compare."""
    options = [f"checkpoint.async_save={str(hurt.async_save).lower()}"]
    with Job(folder, name, *options) as job:
        saves = job.run / "checkpoints"
        job.wait_for(lambda: len(job.ranks()) == job.processes)
        ranks = job.ranks()
        if hurt.moment != "start" and hurt.step:
            job.wait_for_step(hurt.step)
        if hurt.moment == "save":
            job.wait_for(lambda: any(saves.glob(".unfinished-step-*")))
        time.sleep(hurt.delay)
        for rank, process in ranks.items():
            if hurt.victims in ("all", f"rank {rank}"):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has already ended
                    process.send_signal(signal.SIGKILL)
        job.wait()
        reached = max(job.steps(), default=0)
        torn = any(saves.glob(".unfinished-step-*"))
    resumed_from = max(checkpoints(folder, name), default=0)
    try:
        run_to_end(folder, name, *options)
    except AssertionError as error:
        return Outcome(hurt, reached, resumed_from, torn, f"did not continue: {error}")
    changed = differences(folder, name)
    return Outcome(hurt, reached, resumed_from, torn, f"differs in {', '.join(changed)}" if changed else "")
