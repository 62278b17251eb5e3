"""Uses of private Megatron-Core checkpoint APIs, which are needed to survive a failed save.

For megatron-core 0.16.1 and 0.19.2.
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
    """Collect errors in writing common.pt, .metadata and metadata.json in the returned list, from now on.

    Rank 0 writes these files between collectives. An exception there would leave the other ranks waiting in the next one.
    """
    noted: list[Exception] = []

    def noting(write: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(write)
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
                noted.append(error)

        return attempt

    writers: list[tuple[Any, str]] = [(filesystem_async.FileSystemWriterAsync, "finish"), (serialization, "save_config")]
    if hasattr(common, "TorchCommonSaveStrategy"):  # 0.16, which writes a separate common.pt
        writers.append((common.TorchCommonSaveStrategy, "save_common"))
    for owner, name in writers:
        setattr(owner, name, noting(getattr(owner, name)))
    return noted


_manager: SyncManager | None = None


def open_results_queue() -> None:
    """Create a queue for the results of a save, in a manager process that is started if necessary.

    Megatron-Core's own manager process keeps running after a kill -9 of this process. This one also imports neither torch
    nor the main module, which saves seconds in the first save. OSError or EOFError if it cannot be started.
    """
    global _manager
    if _manager is not None:
        with contextlib.suppress(EOFError, OSError):  # it was killed
            filesystem_async._results_queue = _Results(_manager.Queue())
            return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    # Launchers signal whole process groups. The save after such a signal needs this process.
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
    """A queue of pickled results, so that the manager process needs no imports to hold them."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def put(self, result: Any) -> None:
        # `get_nowait` reports a lost manager process. An exception here, between two collectives of a synchronous save,
        # would leave the other ranks waiting.
        with contextlib.suppress(EOFError, OSError):
            self.queue.put(pickle.dumps(result))

    def get_nowait(self) -> Any:
        try:
            return pickle.loads(self.queue.get_nowait())
        except (EOFError, OSError) as error:
            return RuntimeError(f"the process that collects results has ended: {error!r}")  # a result that all ranks receive
