"""`python -m benchmarks.gpu` without a GPU: each check can fail, all results are recorded, and files are atomic."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, operator_checks
from benchmarks.gpu.isolation import Task, run
from benchmarks.gpu.report import Report
from mone_model import neuron_selection
from mone_model.activations import ACTIVATIONS
from mone_model.expert_backends import BACKENDS, Dense, ExpertOutput
from mone_model.neuron_selection import pack, unpack

SHAPE, K = checks.Shape(40, (7,), halves=True), 7
Results = list[torch.Tensor]


class Kernels:
    """torch's operations instead of the Triton kernels, with functions that corrupt their results."""

    def __init__(self, forward: Callable[[Results], None] | None = None, backward: Callable[[Results], None] | None = None):
        self.spoil_forward, self.spoil_backward = forward, backward

    def select_and_gate(self, *arguments: Any) -> Results:
        results = list(torch.ops.mone.select_and_gate(*arguments))
        if self.spoil_forward:
            self.spoil_forward(results)
        return results

    def select_and_gate_backward(self, *arguments: Any) -> Results:
        results = list(torch.ops.mone.select_and_gate_backward(*arguments))
        if self.spoil_backward:
            self.spoil_backward(results)
        return results


@pytest.fixture(autouse=True)
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the kernels, compiled and interpreted."""
    monkeypatch.setattr(neuron_selection, "_kernels_for", lambda tensor: None)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_right_kernels_pass(dtype: str, activation: str) -> None:
    kernels = Kernels()
    records = list(checks.check_selection(dtype, activation, (*checks.SMALL, checks.LONG[1]), 1, "cpu", kernels))
    records += checks.check_edges(dtype, activation, "cpu", kernels)
    assert len(records) == 4 + 2 + 3 + 2
    failed = [(record["name"], record.get("quantity")) for record in records if not record["passed"]]
    # Without kernels it is torch's, which is NaN.
    assert failed == ([("gelu limits", "at infinity")] if activation == "gelu" else [])


def other_neurons(results: Results) -> None:
    """In the first row, keep some of the dropped neurons instead of kept ones."""
    mask_NH = unpack(results[1], SHAPE.neurons)
    mask_NH[0] = torch.zeros_like(mask_NH[0]).scatter(0, (~mask_NH[0]).nonzero().flatten()[:K], True)
    results[1] = pack(mask_NH)


def last_of_equals(results: Results) -> None:
    """Break ties by the higher index."""
    mask_NH = unpack(results[1], SHAPE.neurons)
    names = checks.make_inputs(SHAPE, torch.float32, 0, "cpu").names
    mask_NH[names.index("equal")] = torch.arange(SHAPE.neurons) >= SHAPE.neurons - K
    results[1] = pack(mask_NH)


def one_fewer(results: Results) -> None:
    """Clear the first word of the mask."""
    results[1] = results[1].clone()
    results[1][0] = 0


def outside(results: Results) -> None:
    """Write beyond the end."""
    result = results[0].new_empty(results[0].shape).copy_(results[0])
    result.as_strided((1,), (1,), result.storage_offset() + result.numel()).fill_(0)
    results[0] = result


def add(position: int, amount: float) -> Callable[[Results], None]:
    """Increase the kept values of the first row."""

    def spoil(results: Results) -> None:
        results[position] = results[position].clone()
        results[position][:1] += amount * (results[position][:1] != 0)

    return spoil


def in_dropped(position: int) -> Callable[[Results], None]:
    """Replace a zero."""

    def spoil(results: Results) -> None:
        results[position] = torch.where(results[position] == 0, 1e-30, results[position])

    return spoil


@pytest.mark.parametrize(
    ("quantity", "forward", "backward"),
    [
        ("as many kept", one_fewer, None),
        ("which kept", other_neurons, None),
        ("ties", last_of_equals, None),
        ("gates", add(2, 1e-4), None),
        ("ups", add(3, 1e-4), None),
        ("hidden", add(0, 1e-3), None),
        ("threshold", add(4, 1e-3), None),
        ("hidden of dropped neurons", in_dropped(0), None),
        ("inside its results", outside, None),
        ("dgate", None, add(0, 1e-3)),
        ("dup", None, add(1, 1e-3)),
        ("dprobs", None, add(2, 1e-2)),
        ("dgate of dropped neurons", None, in_dropped(0)),
        ("dup of dropped neurons", None, in_dropped(1)),
    ],
)
def test_wrong_kernels_fail(quantity: str, forward: Any, backward: Any) -> None:
    (record,) = checks.check_selection("fp32", "silu", (SHAPE,), 0, "cpu", Kernels(forward, backward))
    assert not record["passed"]
    share = record["shares"][quantity]
    assert share == "infinite" or share > 1


def test_wrong_limits_and_shapes_fail() -> None:
    limits, _ = checks.check_edges("fp32", "silu", "cpu", Kernels(add(0, 1e-3), add(0, 1e-3)))
    assert not limits["passed"]
    assert {name for name, share in limits["shares"].items() if share == "infinite" or share > 1} >= {"activation", "slope"}

    def column(results: Results) -> None:
        results[4] = results[4][:, None] if len(results[4]) == 0 else results[4]

    _, sizes = checks.check_edges("fp32", "silu", "cpu", Kernels(column))
    assert sizes["shares"]["shapes without rows"] == "infinite"


def test_a_kernel_that_raises_fails_its_check_only() -> None:
    calls = iter([True, False])

    def broken_once(results: Results) -> None:
        if next(calls):
            raise RuntimeError("an illegal memory access was encountered")

    first, second = checks.check_selection("fp32", "silu", (checks.Shape(40, (7, 8)),), 0, "cpu", Kernels(broken_once))
    assert (first["passed"], second["passed"]) == (False, True)
    assert "an illegal memory access" in first["error"]


def test_an_operator_that_differs_from_its_kernel_fails() -> None:
    names, *tensors = checks.make_inputs(SHAPE, torch.float32, 1, "cpu")
    inputs = checks.Inputs(names[-4:], *(tensor[-4:] for tensor in tensors))

    def shares(kernels: Kernels) -> dict[str, Any]:
        return operator_checks.compare_operator(kernels, inputs, K, neuron_selection.select_and_gate).record("")["shares"]

    assert set(shares(Kernels()).values()) == {0.0}
    for position, name in ((0, "hidden"), (4, "threshold")):
        assert shares(Kernels(add(position, 1)))[name] == "infinite"
    for position, name in enumerate(("dgate", "dup", "dprobs")):
        assert shares(Kernels(None, add(position, 1e-4)))[name] == "infinite"


def test_wrong_experts_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("cpu", ("bf16", "fp32"), 16, 32, 50)
    assert all(record["passed"] for record in operator_checks.check_experts(*arguments))

    class Wrong(Dense):
        def compute(self, *arguments: Any) -> ExpertOutput:
            output = super().compute(*arguments)
            return output._replace(out_ND=output.out_ND * 1.05)

    monkeypatch.setitem(BACKENDS, "grouped", Wrong(BACKENDS["grouped"].gemm))  # type: ignore[attr-defined]
    records = [record for record in operator_checks.check_experts(*arguments) if ", 0 rows" not in record["name"]]
    assert [record["passed"] for record in records] == [False] * 4


def test_a_task_that_raises_crashes_or_hangs_fails() -> None:
    (raised,) = run(Task("it", "check", int, ("x",)), timeout=60)  # type: ignore[arg-type]
    (died,) = run(Task("it", "check", os._exit, (3,)), timeout=60)
    (hung,) = run(Task("it", "check", time.sleep, (1000,)), timeout=0.1)  # type: ignore[arg-type]
    assert not any(record["passed"] for record in (raised, died, hung))
    assert "invalid literal" in raised["error"]
    assert died["error"] == "its process died with exit code 3"
    assert hung["error"] == "no result for 0.1 s: killed"


def test_the_file_is_valid_after_each_part_and_marks_completion(tmp_path: Path) -> None:
    path = tmp_path / "report" / "gpu.json"
    report = Report(path, {"gpu": None}, interpreted=True)
    wrong = {"name": "one", "passed": False, "worst": "infinite", "quantity": "ties", "row": "equal", "shares": {}}
    report.add({"kind": "check", "group": "silu", **wrong})
    report.save()
    assert json.loads(path.read_text())["complete"] is False
    times = {"forward_ms": {"median": 1.0}, "backward_ms": {"median": 2.0}, "peak_bytes": 2**30, "kept_bytes": 2**29}
    for contender, ratio in (("ours", 0.25), ("torch", 1.0)):
        record = {"what": "experts", "shape": "D=1", "contender": contender, "ratio": ratio, "passed": True, **times}
        report.add({"kind": "measurement", "group": "experts", "name": contender, **record})
    report.save(complete=True)
    content = json.loads(path.read_text())
    assert content["complete"] is True
    assert [len(content[part]) for part in ("checks", "measurements", "skipped")] == [1, 2, 0]
    assert [record["name"] for record in report.failures] == ["one"]
    tables = report.tables()
    assert "| silu   | 0      | 1      | infinite" in tables
    assert "| ours      | 0.25  | 1.000      | 2.000       | 1.00" in tables
    assert list(path.parent.iterdir()) == [path]


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "it needs an NVIDIA GPU, torch built for CUDA, and triton" in line


def test_a_failure_is_recorded_and_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # undone afterwards, as are the handlers
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "check_tasks", lambda **_: [Task("broken", "check", int, ("x",))])  # type: ignore[arg-type]
    monkeypatch.setattr(gpu, "measurement_tasks", lambda *_, **__: [])
    assert gpu.main(["--interpret", "--output", str(tmp_path / "gpu.json")]) == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert (content["complete"], [record["passed"] for record in content["checks"]]) == (True, [False])
    assert "FAILED: broken: the process: ValueError: invalid literal" in capsys.readouterr().out


def test_a_gpu_gets_every_kernel_block_dtype_and_activation() -> None:
    from mone_model.kernels.triton.selection import MAX_NEURONS, block_size

    tasks = gpu.check_tasks(interpret=False)
    selections = [task.arguments for task in tasks if task.function is checks.check_selection]
    assert {arguments[:2] for arguments in selections} == {(d, a) for d in checks.DTYPES for a in ACTIVATIONS}
    for dtype in checks.DTYPES:
        blocks = {block_size(shape.neurons) for d, _, shapes, *_ in selections if d == dtype for shape in shapes}
        assert blocks == {128, 512, 1024, 2048, 4096, 16384}
    assert max(shape.neurons for _, _, shapes, *_ in selections for shape in shapes) == MAX_NEURONS


def test_in_the_interpreter_it_records_everything(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.7")  # earlier versions fail with numpy 2.4
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--interpret", "--minutes", "60", "--output", str(output)]
    done = subprocess.run(command, cwd=Path(gpu.__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(output.read_text())
    assert content["complete"]
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert {record["group"] for record in content["checks"]} == {"silu bf16", "silu edges", "operators", "experts"}
    assert all(record["passed"] for record in content["checks"] + content["measurements"])
    measured = {(record["what"], record["contender"], record["ratio"]) for record in content["measurements"]}
    names = ["ours", "torch", "torch compiled", "ours compiled"]
    ratios = [1.0, 0.5, 0.25, 0.125]
    experts = {("experts", name, ratio) for name in names for ratio in ratios}
    selection = {("select_and_gate", name, ratio) for name in names[:3] for ratio in ratios}
    assert measured == experts | selection - {("select_and_gate", "ours", 1.0)}
    assert [record["name"] for record in content["skipped"]] == ["training step of mone_small"]
    assert "9 of 9 checks passed" in done.stdout
