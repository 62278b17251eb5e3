"""`mone_model.megatron.prepare`: Megatron-Core runs on CPUs, and other modules are not changed."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from mone_common.console import UserError
from mone_model.megatron import versions
from tests.conftest import ROOT


def run(*arguments: str, before: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, with the folder `before` first on the path."""
    environment = {**os.environ, "PYTHONPATH": f"{before}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_nothing_of_torch_changes_and_a_second_call_changes_nothing() -> None:
    program = """
import sys, torch, torch._dynamo, torch.distributed as dist  # the import of torch._dynamo replaces torch.manual_seed
from mone_model import megatron

def attributes(*owners):
    return {(id(owner), name): id(value) for owner in owners for name, value in list(vars(owner).items())}

def of_torch():
    return attributes(torch, torch.Tensor, torch.nn.Module, torch.cuda, dist, dist.distributed_c10d)

def of_megatron():
    return attributes(*(module for name, module in list(sys.modules.items()) if name.startswith("megatron.")))

before = of_torch()
megatron.prepare()
after = of_torch()
assert {key: after[key] for key in before} == before
once = of_megatron()
assert once
megatron.prepare()
assert of_megatron() == once
"""
    result = run("-c", program)
    assert result.returncode == 0, result.stderr


def test_torch_compile_and_wandb_work_after_it() -> None:
    program = """
import torch
from mone_model import megatron

megatron.prepare()
graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

double = torch.compile(lambda x: 2 * x, backend=backend)
assert double(torch.ones(3)).tolist() == [2, 2, 2] and len(graphs) == 1
import wandb
wandb.init
"""
    result = run("-c", program)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="then it replaces nothing")
def test_all_modules_that_training_imports_are_reached() -> None:
    program = """
import sys, torch
from mone_model import megatron
megatron.prepare()
import train.training_run, train.engines.megatron, train.engines.deepspeed

modules = {name: module for name, module in sys.modules.items() if name.startswith("megatron.core.")}
print([name for name, module in modules.items() if any(value in (torch, torch.cuda, torch.distributed)
    for value in vars(module).values() if isinstance(value, type(torch)))])
"""
    result = run("-c", program)
    assert result.stdout.endswith("[]\n"), result.stdout + result.stderr  # DeepSpeed logs to stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="then it replaces nothing")
def test_prepare_refuses_to_run_after_megatron_core() -> None:
    result = run("-c", "import megatron.core, mone_model.megatron; mone_model.megatron.prepare()")
    assert result.returncode == 1
    assert "RuntimeError: call mone_model.megatron.prepare() before you import megatron.core" in result.stderr


@pytest.mark.parametrize(
    ("version", "supported"), [("0.16.1", True), ("0.19.2", True), ("0.17.0", False), ("0.15.3", False), ("1.0.0", False)]
)
def test_versions_that_were_not_run_are_refused(version: str, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if supported:
        versions.check_version()
    else:
        with pytest.raises(UserError, match=f"^megatron-core {version} is not supported; pip install megatron-core=="):
            versions.check_version()


@pytest.mark.parametrize(
    "arguments", [("-m", "train.pretrain"), ("-c", "from mone_common.commands import pretrain; pretrain()")]
)
def test_a_command_with_an_unsupported_version_prints_one_line(arguments: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "megatron_core-0.17.0.dist-info").mkdir()
    (tmp_path / "megatron_core-0.17.0.dist-info/METADATA").write_text("Name: megatron-core\nVersion: 0.17.0\n")
    result = run(*arguments, before=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: megatron-core 0.17.0 is not supported; pip install megatron-core==")
    assert result.stderr.count("\n") == 1


def exchange(rank: int, store: str) -> None:
    """Two ranks with 1 and 2 rows, with the functions that Megatron-Core's token dispatchers call."""
    from megatron.core.tensor_parallel import mappings

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    group, sizes = dist.group.WORLD, [1, 2]
    mine = torch.full((sizes[rank], 3), float(rank), requires_grad=True)
    gathered = mappings.gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=sizes)
    assert gathered.tolist() == [[0] * 3, [1] * 3, [1] * 3]
    (gathered * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    assert mine.grad is not None
    assert mine.grad[:, 0].tolist() == [[2], [20, 200]][rank]
    summed = mappings.reduce_scatter_to_sequence_parallel_region(
        torch.tensor([[1.0], [2.0], [3.0]]) * (rank + 1), group=group, input_split_sizes=sizes
    )
    assert summed.tolist() == [[[3]], [[6], [9]]][rank]
    average = torch.tensor([1.0 + rank])
    mappings.torch.distributed.all_reduce(average, op=dist.ReduceOp.AVG)
    assert average.item() == 1.5
    dist.destroy_process_group()


def test_gloo_gathers_and_scatters_what_is_uneven(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(exchange, (str(tmp_path / "store"),), nprocs=2)
