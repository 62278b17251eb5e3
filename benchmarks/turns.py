"""Contenders take turns, each in a process of its own, so that a slow minute of the machine hits all of them.

seconds = take_turns({"ours": Contender(build_ours), "theirs": Contender(build_theirs)}, rounds=5)
print(ratio(seconds["ours"], seconds["theirs"]))       # 0.61 [0.58, 0.64]
"""

import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from configs.console import ReportedError

Run = Callable[[], Any]
# For the configuration of a benchmark: nothing is written.
HYDRA = {"run": {"dir": "."}, "output_subdir": None}
LOGGING = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]


def take_turns(contenders: dict[str, functools.partial[Run]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of each contender in each round: the mean of `repeats` runs after one that is not counted.

    contenders: by name, what builds it; called in the contender's process and returns what is timed.
    """
    spawn = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for name, build in contenders.items():
            here, there = spawn.Pipe()
            process = spawn.Process(target=_work, args=(build, there, repeats), daemon=True)
            workers[name] = process, here
            process.start()
            there.close()  # only the contender has it now: its death ends what is read here
            _ask(name, *workers[name])  # built: one after another, since building uses all cores too
        for _ in range(rounds):
            for name, worker in workers.items():
                seconds[name].append(_ask(name, *worker))
    finally:
        for process, _ in workers.values():
            process.kill()
    return seconds


def _ask(name: str, process: Any, connection: Connection) -> float:
    """Let a contender take its turn: its seconds; ReportedError if it died."""
    try:
        connection.send("run")
        return connection.recv()
    except (EOFError, OSError) as error:
        process.join()
        died = f"its process died with exit code {process.exitcode}"
        raise ReportedError(f"{name}: {died}; -9 means memory: make it smaller") from error


def _work(build: functools.partial[Run], connection: Connection, repeats: int) -> None:
    connection.recv()
    run = build()
    run()
    connection.send(0.0)
    while connection.recv():
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        connection.send((time.perf_counter() - start) / repeats)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median over rounds of ours / theirs, and the smallest and largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
