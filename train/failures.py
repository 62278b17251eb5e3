"""Describe failures of ranks, one line for each distinct reason."""

import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """The reason why a rank ends."""

    rank: int
    host: str
    reason: str
    code: int
    """Exit code."""


def describe_failures(failures: list[Failure], world_size: int) -> str:
    """One line for failures with the same reason; names ranks and hosts unless all ranks failed."""
    if len(failures) == world_size:
        return failures[0].reason
    hosts = dict.fromkeys(failure.host for failure in failures)
    of_host = {host: [failure.rank for failure in failures if failure.host == host] for host in hosts}
    where = ", ".join(f"{describe_ranks(ranks)} on {host}" for host, ranks in of_host.items())
    return f"{where}: {failures[0].reason}"


def describe_ranks(ranks: Iterable[int]) -> str:
    """Ranks as text, such as "rank 3" or "ranks 0, 8 to 15"."""
    ordered = sorted(ranks)
    rank_less_place: Callable[[tuple[int, int]], int] = lambda numbered: numbered[1] - numbered[0]  # noqa: E731
    runs = [[rank for _, rank in run] for _, run in itertools.groupby(enumerate(ordered), key=rank_less_place)]
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]}{' to ' if len(run) > 2 else ', '}{run[-1]}" for run in runs]
    return f"{'rank' if len(ordered) == 1 else 'ranks'} {', '.join(spans)}"


def print_error(text: str) -> None:
    """Print the error with which the process ends, in the form of `mone_common.console`."""
    print(f"error: {text}", file=sys.stderr, flush=True)
