"""The one place for names that Megatron-Core does not promise to keep: it offers no other way to survive a save that fails.

Written for megatron-core 0.16.1 and 0.19.2.
"""

import contextlib
import functools
import multiprocessing
import pickle
import sys
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async

from mone_common.processes import outlive_signals


@functools.cache
def noted_errors() -> list[Exception]:
    """From now on errors in writing common.pt, .metadata and metadata.json go to this list, for the ranks to agree on.

    Rank 0 writes them between collectives: raised there, an error would leave the other ranks waiting in the next one.
    """
    noted: list[Exception] = []

    def noting(write: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(write)
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch.save raises the latter for a full disk
                noted.append(error)

        return attempt

    writers: list[tuple[Any, str]] = [(filesystem_async.FileSystemWriterAsync, "finish"), (serialization, "save_config")]
    if hasattr(common, "TorchCommonSaveStrategy"):  # 0.16, where common.pt is a file apart
        writers.append((common.TorchCommonSaveStrategy, "save_common"))
    for owner, name in writers:
        setattr(owner, name, noting(getattr(owner, name)))
    return noted


_manager: SyncManager | None = None


def open_results_queue() -> None:
    """Make a queue for the results of a save, in a process of its own, which is started unless it runs.

    Megatron-Core's own survives a kill -9 of this process. Ours knows nothing of torch, nor of the main module, which others
    of its kind spend seconds of the first save on. OSError or EOFError if it cannot be started.
    """
    global _manager
    if _manager is not None:
        with contextlib.suppress(EOFError, OSError):  # it was killed
            filesystem_async._results_queue = _Results(_manager.Queue())
            return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    # Launchers signal whole process groups, and the save that follows a signal needs this process.
    main = sys.modules["__main__"]
    names = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    try:
        for name in names:
            setattr(main, name, None)
        manager.start(initializer=outlive_signals)
    finally:
        for name, value in names.items():
            setattr(main, name, value)
    filesystem_async._results_queue = _Results(manager.Queue())
    _manager = manager


class _Results:
    """A queue that the manager need not understand the content of."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def put(self, result: Any) -> None:
        # Without the process that collects them `get_nowait` says so; raised here, between two collectives of a save that
        # training waits for, the error would leave the other ranks waiting.
        with contextlib.suppress(EOFError, OSError):
            self.queue.put(pickle.dumps(result))

    def get_nowait(self) -> Any:
        try:
            return pickle.loads(self.queue.get_nowait())
        except (EOFError, OSError) as error:
            return RuntimeError(f"the process that collects results is gone: {error!r}")  # a result, which all ranks hear of
