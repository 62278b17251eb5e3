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
    for name, build in contenders.items():
        here, there = spawn.Pipe()
        workers[name] = spawn.Process(target=_work, args=(build, there, repeats), daemon=True), here
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for name, (process, connection) in workers.items():
            process.start()
            _answer(name, process, connection)  # built: one after another, since building uses all cores too
        for _ in range(rounds):
            for name, (process, connection) in workers.items():
                connection.send("run")
                seconds[name].append(_answer(name, process, connection))
    finally:
        for process, _ in workers.values():
            process.kill()
    return seconds


def _answer(name: str, process: Any, connection: Connection) -> Any:
    """What a contender says; ReportedError if it died."""
    while not connection.poll(1):
        if not process.is_alive():
            raise ReportedError(
                f"{name}: its process died with exit code {process.exitcode}; -9 means memory: make it smaller"
            )
    return connection.recv()


def _work(build: functools.partial[Run], connection: Connection, repeats: int) -> None:
    run = build()
    run()
    connection.send("built")
    while connection.recv():
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        connection.send((time.perf_counter() - start) / repeats)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median over rounds of ours / theirs, and the smallest and largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
