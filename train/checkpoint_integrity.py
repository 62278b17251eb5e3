"""Choose the checkpoint to continue from: the newest that is intact, fits the model, and executes no code on loading.

found, problems = list_checkpoints(folder)            # checks manifests and file sizes; not a collective
checkpoint, problems = newest_intact(found, trust=False)                              # checks the content of files
checkpoint, loaded, problems = load_newest(found, make_state, trust=False)            # also checks the fit, and loads

`newest_intact` and `load_newest` are collectives on every rank.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from mone_common.checkpoint_folder import Checkpoint, check_content
from mone_common.checkpoint_folder import list_checkpoints as list_checkpoints
from mone_common.checkpoint_index import check_executes_no_code, check_index
from mone_common.text import excerpt
from train.checkpoint_fit import check_fits
from train.checkpoint_loading import load_checkpoint


def newest_intact(found: list[Checkpoint], *, trust: bool) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint with intact content, and the problems of newer ones; a collective on every rank.

    Each rank reads a part of the files. trust: accept pickled code.
    """
    problems: list[str] = []
    steps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, [checkpoint.step for checkpoint in found])
    if any(others != steps[0] for others in steps):
        raise RuntimeError(
            f"run.dir: rank {dist.get_rank()} sees checkpoints of steps {steps[dist.get_rank()]}, rank 0 of {steps[0]}; "
            "run.dir must be on a file system that all nodes share"
        )
    for checkpoint in reversed(found):
        # Check the content first: damage must not be reported as untrusted code, which invites the user to trust it.
        problem = _first(_problem_of_share(checkpoint)) or _first(None if trust else _problem_of_code(checkpoint))
        if problem is None:
            return checkpoint, problems
        problems.append(f"{checkpoint.path}: {problem}")
    return None, problems


def _first(mine: str | None) -> str | None:
    """The problem of the lowest rank that has one; a collective on every rank."""
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return next((problem for problem in gathered if problem is not None), None)


def load_newest(
    found: list[Checkpoint],
    make_state: Callable[[], dict[str, Any]],
    *,
    trust: bool,
    whole: bool = True,
    same_layout: Callable[[Checkpoint], bool] = lambda checkpoint: False,
) -> tuple[Checkpoint | None, dict[str, Any], list[str]]:
    """Fill a sharded state from the newest checkpoint that is intact, fits the state, and holds only finite numbers.

    Returns the checkpoint, the filled state, and the problems of newer ones; a collective on every rank. make_state: creates
    the state to fill, once for each checkpoint that is tried. whole: the checkpoint must hold nothing else. same_layout:
    whether to restore the random generators from a checkpoint.
    """
    problems: list[str] = []
    while found:
        checkpoint, more = newest_intact(found, trust=trust)
        problems += more
        if checkpoint is None:
            break
        try:
            state = make_state()
            check_fits(checkpoint, state, whole=whole)
            return checkpoint, load_checkpoint(checkpoint, state, same_layout=same_layout(checkpoint)), problems
        except ValueError as error:  # raised on every rank
            problems.append(f"{checkpoint.path}: {error}")
        found = found[: found.index(checkpoint)]
    return None, {}, problems


def _problem_of_share(checkpoint: Checkpoint) -> str | None:
    """A problem in the content of this rank's share of the files, or None."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def check() -> None:
        for name in sorted(checkpoint.files)[rank::ranks]:
            check_content(checkpoint, name)

    return _problem(check)


def _problem_of_code(checkpoint: Checkpoint) -> str | None:
    """A problem in the pickled data, or None. Only rank 0 checks."""

    def check() -> None:
        check_executes_no_code(checkpoint.path)
        check_index(checkpoint)

    return _problem(check) if dist.get_rank() == 0 else None


def _problem(check: Callable[[], None]) -> str | None:
    """The error of a check as text, or None. Does not raise, since that would leave the other ranks waiting."""
    try:
        check()
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"damaged: {type(error).__name__}: {excerpt(error)}"
    return None
