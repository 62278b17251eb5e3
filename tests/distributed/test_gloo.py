"""Collectives over gloo as Megatron-Core calls them: averages, uneven gathers and scatters, groups of one rank."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from mone_model import megatron

SIZE = 3
ROWS = (2, 0, 3)
"""Rows that each rank holds of an uneven tensor."""


def part(rank: int, rows: int) -> torch.Tensor:
    """[rows, 4], different on each rank."""
    return 100.0 * rank + torch.arange(rows * 4.0).reshape(rows, 4)


def act(rank: int, folder: str) -> None:
    """All collectives on one rank; saves what they gave."""
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timeout=datetime.timedelta(seconds=60), rank=rank, world_size=SIZE
    )
    from megatron.core.tensor_parallel import mappings

    seen: Any = mappings.torch.distributed  # as Megatron-Core sees it
    pair, alone = dist.new_group([0, 2]), [dist.new_group([other]) for other in range(SIZE)][rank]
    found: dict[str, Any] = {}
    for name, op in (("average", dist.ReduceOp.AVG), ("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):
        found[name] = torch.tensor([1.0, 10.0]) * (rank + 1)
        seen.all_reduce(found[name], op=op)
    if rank != 1:
        found["average of two"] = torch.tensor([1.0]) * (rank + 1)
        work = seen.all_reduce(found["average of two"], op=dist.ReduceOp.AVG, group=pair, async_op=True)
        assert work is not None
        work.wait()
    found["alone"] = torch.tensor([1.0]) * (rank + 1)
    work = seen.all_reduce(found["alone"], group=alone, async_op=True)
    assert work is not None
    work.wait()
    found["gathered"] = [torch.empty(rows, 4) for rows in ROWS]
    seen.all_gather(found["gathered"], part(rank, ROWS[rank]))
    found["gathered evenly"] = [torch.empty(2, 4) for _ in ROWS]
    seen.all_gather(found["gathered evenly"], part(rank, 2))
    found["scattered"] = torch.empty(ROWS[rank], 4)
    seen.reduce_scatter(found["scattered"], [part(rank, rows) for rows in ROWS])
    found["scattered evenly"] = torch.empty(2, 4)
    seen.reduce_scatter(found["scattered evenly"], [part(rank, 2) + 1000 * to for to in range(SIZE)])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def start(_: int, folder: str) -> None:
    """Import once, in a process without groups, and fork all ranks."""
    megatron.prepare()
    multiprocessing.start_processes(act, (folder,), nprocs=SIZE, start_method="fork")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes got."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    multiprocessing.start_processes(start, (str(folder),), nprocs=1, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


def test_reductions(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        torch.testing.assert_close(of_rank["average"], torch.tensor([2.0, 20.0]))
        assert of_rank["sum"].tolist() == [6.0, 60.0]
        assert of_rank["max"].tolist() == [3.0, 30.0]
    assert [of_rank["alone"].item() for of_rank in found] == [1.0, 2.0, 3.0]
    assert found[0]["average of two"].tolist() == found[2]["average of two"].tolist() == [2.0]


def test_gathers_of_uneven_and_even_parts(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        for rank, rows in enumerate(ROWS):
            assert torch.equal(of_rank["gathered"][rank], part(rank, rows))
            assert torch.equal(of_rank["gathered evenly"][rank], part(rank, 2))


def test_scatters_of_uneven_and_even_parts(found: list[dict[str, Any]]) -> None:
    for rank, of_rank in enumerate(found):
        assert torch.equal(of_rank["scattered"], torch.stack([part(other, ROWS[rank]) for other in range(SIZE)]).sum(0))
        assert torch.equal(
            of_rank["scattered evenly"], torch.stack([part(other, 2) + 1000 * rank for other in range(SIZE)]).sum(0)
        )
