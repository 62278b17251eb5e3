"""Run a task in a process of its own: a kernel that hangs or corrupts its CUDA context spoils no other task.

task = Task("silu bf16", check_selection, ("silu", "bf16"))
for record in run(task, timeout=120):           # what the function yields, as it comes
    ...
"""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Record = dict[str, Any]
"""One result, ready for JSON: `kind` is "check", "measurement" or "skipped"; checks have `passed`."""


@dataclass(frozen=True)
class Task:
    """A function that yields records, and its arguments; both can be pickled."""

    name: str
    kind: str
    """That of its records, and of the one that says that it failed."""
    function: Callable[..., Iterator[Record]]
    arguments: tuple[Any, ...] = ()


def run(task: Task, timeout: float) -> Iterator[Record]:
    """Yield the task's records. If it raises, exits or sends nothing for `timeout` seconds, the last one has `error`."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(task, there), daemon=True)
    process.start()
    there.close()  # only the task has it now: its death ends what is read here
    try:
        while here.poll(timeout):
            record = here.recv()
            if record is None:
                return
            yield record
        yield failure(task, f"no result for {timeout:g} s: killed")
    except EOFError:
        process.join()
        yield failure(task, f"its process died with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def failure(task: Task, error: str) -> Record:
    """The record of a task that could not go on."""
    return {"kind": task.kind, "group": task.name, "name": "the process", "passed": False, "error": error}


def _work(task: Task, connection: Connection) -> None:
    try:
        for record in task.function(*task.arguments):
            connection.send({"kind": task.kind, "group": task.name, **record})
    except Exception:  # whatever it is, it is a result
        connection.send(failure(task, traceback.format_exc(limit=-4)))
    connection.send(None)
