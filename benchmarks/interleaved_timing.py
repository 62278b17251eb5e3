"""Times contenders in turns, each in its own processes, so that other load on the machine affects all of them.

seconds = time_interleaved({"ours": functools.partial(build_ours), "theirs": functools.partial(build_theirs)}, rounds=5)
print(ratio(seconds["ours"], seconds["theirs"]))       # 0.61 [0.58, 0.64]
"""

import functools
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed.elastic.utils.distributed import get_free_port

from mone_common.console import ReportedError

Run = Callable[[], Any]
# Untimed runs at the start, which allocate memory from the system.
WARM_UP = 4
# Hydra settings of a benchmark: write no files.
HYDRA = {"run": {"dir": "."}, "output_subdir": None}
LOGGING = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]


def time_interleaved(
    contenders: dict[str, functools.partial[Run]],
    rounds: int,
    repeats: int = 1,
    processes: dict[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round: the mean of `repeats` runs, after WARM_UP untimed runs.

    contenders: by name, a function that is called in the contender's process and returns the function to time.
    processes: number of processes of each contender, 1 by default. Several processes get the environment of torchrun; the
    time is that of the slowest process.
    clock: `time.process_time` measures CPU time instead of wall time.
    """
    # Without this handler, stopped processes would outlive this one.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    spawn = multiprocessing.get_context("spawn")
    workers: dict[str, list[tuple[Any, Connection]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for name, build in contenders.items():
            workers[name] = []
            for environment in torchrun_environments((processes or {}).get(name, 1)):
                here, there = spawn.Pipe()
                process = spawn.Process(target=_work, args=(build, there, repeats, environment, clock), daemon=True)
                workers[name].append((process, here))
                process.start()
                there.close()  # so that recv raises EOFError if the contender dies
            _ask(name, workers[name])  # build one after another, because building uses all cores
        for _ in range(rounds):
            for name, members in workers.items():
                seconds[name].append(_ask(name, members))
    finally:
        for process, _ in (member for members in workers.values() for member in members):
            process.kill()
            process.join()  # frees its memory
        signal.signal(signal.SIGTERM, before)
    return seconds


def torchrun_environments(count: int) -> list[dict[str, str]]:
    """The environment variables that torchrun sets for each of `count` processes; none for a single process."""
    if count == 1:
        return [{}]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": get_free_port()}
    return [{name: str(value) for name, value in (common | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(count)]


def _ask(name: str, members: list[tuple[Any, Connection]]) -> float:
    """Run a contender's turn and return its seconds; ReportedError if a process died."""
    try:
        for process, connection in members:
            os.kill(process.pid, signal.SIGCONT)
            connection.send("run")
        seconds = max([connection.recv() for _, connection in members])
        for process, _ in members:
            os.kill(process.pid, signal.SIGSTOP)  # otherwise gloo's threads wake up 100 times per second in each process
        return seconds
    except (EOFError, OSError) as error:
        ended = wait([process.sentinel for process, _ in members])
        dead = next(process for process, _ in members if process.sentinel in ended)
        dead.join()
        died = f"its process died with exit code {dead.exitcode}"
        raise ReportedError(f"{name}: {died}; -9 may mean out of memory: use a smaller size") from error


def _work(
    build: functools.partial[Run],
    connection: Connection,
    repeats: int,
    environment: dict[str, str],
    clock: Callable[[], float],
) -> None:
    connection.recv()
    os.environ.update(environment)
    run = build()
    for _ in range(WARM_UP):
        run()
    connection.send(0.0)
    while connection.recv():
        start = clock()
        for _ in range(repeats):
            run()
        connection.send((clock() - start) / repeats)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median, smallest and largest of ours / theirs over the rounds."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
