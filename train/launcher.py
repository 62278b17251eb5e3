"""Read and check the environment variables that torchrun, or another launcher, sets.

check_launcher()                 # UserError for incomplete or inconsistent variables
rank, world_size = rank_and_world_size()
launcher_has_gone()              # whether torchrun was killed
"""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from mone_common.commands import PARENT
from mone_common.console import UserError
from mone_common.output import drain_output

ALWAYS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that all launchers set."""
LOOK_SECONDS = 1.0
"""Seconds between checks whether torchrun runs."""
ON_THIS_MACHINE = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables that some launchers set."""


def check_launcher() -> None:
    """UserError unless the launcher's variables are all set and consistent, or none is set."""
    found = {name: os.environ[name] for name in (*ALWAYS, *ON_THIS_MACHINE) if name in os.environ}
    if not found:
        return
    missing = [name for name in ALWAYS if not found.get(name)]
    problem = f"{' and '.join(missing)} missing" if missing else _why_not(found)
    if problem:
        values = " ".join(f"{name}={value!r}" for name, value in found.items())
        raise UserError(
            f"environment variables {values}: {problem}; start several processes with torchrun, which sets them all; "
            f"for a single process unset {' '.join(found)}"
        )


def check_alone(command: str) -> None:
    """UserError if a launcher started several processes of a single-process command, or its variables are inconsistent."""
    check_launcher()
    if rank_and_world_size()[1] > 1:
        raise UserError(
            f"WORLD_SIZE={rank_and_world_size()[1]}: {command} runs in one process; start it without torchrun, "
            f"and unset {' '.join((*ALWAYS, *ON_THIS_MACHINE))} if they are set"
        )


def _why_not(found: dict[str, str]) -> str | None:
    for name, value in found.items():
        if name != "MASTER_ADDR" and not re.fullmatch(r"[0-9]{1,9}", value):
            return f"{name} is not a number"
    number = {name: int(value) for name, value in found.items() if name != "MASTER_ADDR"}
    if number["RANK"] >= number["WORLD_SIZE"]:
        return "RANK must be below WORLD_SIZE"
    if not 0 < number["MASTER_PORT"] < 2**16:
        return "MASTER_PORT must be from 1 to 65535"
    here = number.get("LOCAL_WORLD_SIZE", number["WORLD_SIZE"])
    if not number.get("LOCAL_RANK", 0) < here <= number["WORLD_SIZE"]:
        return "LOCAL_RANK must be below LOCAL_WORLD_SIZE, and that at most WORLD_SIZE"
    return None


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of processes, from the environment; 0 and 1 without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def launcher_has_gone() -> bool:
    """Whether torchrun has ended; False if torchrun did not start this process."""
    return under_torchrun() and os.getppid() != PARENT


@contextlib.contextmanager
def ending_with_launcher() -> Iterator[Callable[[], None]]:
    """End this process with exit code 1 if torchrun ends during the block, since other processes may then be missing.

    For the start of a run, when there is nothing to save; later `StopRequest` checks. Yields a function that ends the watch.
    """
    left = threading.Event()

    def watch() -> None:
        while not left.wait(LOOK_SECONDS):
            if launcher_has_gone() and not left.is_set():
                print("error: torchrun ended while the run started", file=sys.stderr, flush=True)
                drain_output(2.0)
                os._exit(1)

    if under_torchrun():
        threading.Thread(target=watch, name="launcher", daemon=True).start()
    try:
        yield left.set
    finally:
        left.set()


def remove_empty_logs() -> None:
    """Remove empty temporary folders of torchrun's logs.

    torchrun creates them at each start, even if it writes no logs, and does not remove them.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        return
    logs = Path(error_file).parents[3] if len(Path(error_file).parents) > 3 else Path()
    if logs.name.startswith("torchelastic_"):  # torchelastic_*/RUN_*/attempt_N/LOCAL_RANK/error.json
        for folder, _, _ in os.walk(logs, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
