"""Process groups, device, seeds, teardown.

with distributed(config.parallel, seed=1, timeout_minutes=30) as runtime:    # torchrun, or one process without it
    engine = MegatronEngine(config, runtime)
"""

import contextlib
import ctypes
import datetime
import os
import random
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from mone_model.config import ParallelConfig

MEETING_SECONDS = 600.0


@dataclass(frozen=True)
class Runtime:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def place() -> tuple[int, int]:
    """This process's rank and the number of processes, known before they meet; 0 and 1 without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def rendezvous() -> dist.Store:
    """Meet the job's other processes, by what torchrun put into the environment; alone without it."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    store, rank, world_size = next(dist.rendezvous("env://"))
    return _unused(store, rank, world_size) if "TORCHELASTIC_RUN_ID" in os.environ else store


def _unused(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of a store that no process has written to before.

    torchrun --max-restarts may keep its store when it starts the processes again; in it are the addresses of those that
    are gone. Its count of restarts differs between nodes, so rank 0 hands out a name for this start.
    """
    mine, began, missing = uuid.uuid4().hex, time.monotonic(), set(range(1, world_size))
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        start = store.get(f"welcome/{mine}").decode()
        store.set(f"met/{start}/{rank}", "")
        return dist.PrefixStore(start, store)
    while missing:
        for other in sorted(missing):
            # Perhaps of a process that is gone; the one that is there says another word soon.
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", mine)
            if store.check([f"met/{mine}/{other}"]):
                missing.remove(other)
        if time.monotonic() - began > MEETING_SECONDS:
            raise TimeoutError(f"ranks {sorted(missing)} did not come within {MEETING_SECONDS:.0f} s")
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


@contextlib.contextmanager
def distributed(
    parallel: ParallelConfig, *, seed: int, timeout_minutes: float, store: dist.Store | None = None
) -> Iterator[Runtime]:
    """Join the job's processes (NCCL on GPUs, else gloo), build the parallel groups, seed, and leave at the end.

    store: where they meet; None: `rendezvous()`. After an exception no collective is called: the others may not be there
    any more.
    """
    # Notes of Megatron-Core to its own developers, on every rank.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        keep_freed_memory()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if cuda else "gloo"
    store = store or rendezvous()
    rank, world_size = place()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    build_groups(parallel)
    set_seeds(seed)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    yield Runtime(rank, world_size, device)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let this process reuse the memory of freed tensors: returned to the system, each page of it is zeroed anew.

    A training step frees and allocates the same sizes again and again, and those page faults can take a third of it.
    glibc only; elsewhere it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, 2**31 - 1)


def build_groups(parallel: ParallelConfig) -> None:
    """Build Megatron-Core's process groups for this layout."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )


def set_seeds(seed: int) -> None:
    """Seed Python, numpy and torch: alike on data-parallel ranks, different on tensor- and pipeline-parallel ones."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
