"""Functions of the GPU kernels in Triton's interpreter.

Triton reads at its first import whether to interpret, and torch imports Triton. The interpreter therefore runs in a separate
process.
"""

import contextlib
import importlib
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks.gpu.checks import Guarded

Interpreter = Callable[..., Any]


def call_guarded(pickled: bytes) -> bytes:
    """Call a function in this process and check that nothing is written around its results."""
    module, name, arguments, options = pickle.loads(pickled)
    torch.set_num_threads(1)
    with Guarded() as guard:
        results = getattr(importlib.import_module(module), name)(*arguments, **options)
    assert guard.intact()
    return pickle.dumps((results, len(guard.cells)))


@contextlib.contextmanager
def interpreting(module: str) -> Iterator[Interpreter]:
    """interpreter(name, *arguments, guarded=number, **options) calls a function of a module.

    guarded: how many of the tensors that it creates must be surrounded by guards, at least.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()

        def call(name: str, *arguments: Any, guarded: int = 0, **options: Any) -> Any:
            pickled = pickle.dumps((module, name, arguments, options))
            results, cells = pickle.loads(pool.submit(call_guarded, pickled).result())
            assert cells >= guarded, "not all results were guarded"
            return results

        yield call
