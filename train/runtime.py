"""Process groups, device, seeds, teardown.

with distributed(config.parallel, seed=1, timeout_minutes=30) as runtime:    # torchrun, or one process without it
    engine = MegatronEngine(config, runtime)
"""

import contextlib
import ctypes
import datetime
import os
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from mone_model.config import ParallelConfig
from train.launcher import rank_and_world_size
from train.meeting import Meeting


@dataclass(frozen=True)
class Runtime:
    """Rank, world size and device of this process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


@contextlib.contextmanager
def distributed(
    parallel: ParallelConfig, *, seed: int, timeout_minutes: float, store: dist.Store | None = None
) -> Iterator[Runtime]:
    """Initialize torch.distributed (NCCL on GPUs, else gloo), parallel groups and seeds; destroy the groups at the end.

    store: for the process group; None: that of a `Meeting`. After an exception no collective is called, since other ranks
    may have ended.
    """
    # Warnings for developers of Megatron-Core and torch, on every rank.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(_num_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        keep_freed_memory()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if cuda else "gloo"
    rank, world_size = rank_and_world_size()
    store = store or Meeting(rank, world_size).store
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    build_groups(parallel)
    set_seeds(seed)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    yield Runtime(rank, world_size, device)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _num_threads(local_world_size: int) -> int:
    """Threads of this process: its share of the cores. For a single process OMP_NUM_THREADS says it, if it is set."""
    if local_world_size == 1 and "OMP_NUM_THREADS" in os.environ:  # torchrun sets it to 1 for several processes
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for reuse instead of returning it to the system.

    A training step frees and allocates the same sizes repeatedly. With memory from the system, page faults can take a third
    of its time. Has an effect with glibc only.
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
    """Seed Python, numpy and torch: equal on data-parallel ranks, different on tensor- and pipeline-parallel ranks."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
