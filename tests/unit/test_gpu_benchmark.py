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
from benchmarks.gpu import checks, decode_checks, operator_checks
from benchmarks.gpu.isolation import Task, run
from benchmarks.gpu.report import Report
from benchmarks.gpu.training import compare_losses
from mone_model import neuron_selection
from mone_model.activations import ACTIVATIONS
from mone_model.expert_backends import BACKENDS, Dense, ExpertOutput
from mone_model.kernels.triton.decode import Kept
from mone_model.neuron_selection import pack, scores_of, select_neurons_reference, unpack

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


class Few:
    """torch's operations instead of the Triton kernels for few rows, with functions that corrupt their results."""

    def __init__(self, lists: Callable[[Kept], None] | None = None, out: Callable[[torch.Tensor], None] | None = None):
        self.spoil_lists, self.spoil_out = lists, out

    def select_rows(
        self,
        gate_NH: torch.Tensor,
        probs_N: torch.Tensor,
        experts_N: torch.Tensor,
        k: int,
        activation: str,
        threshold: Any = None,
    ) -> Kept:
        active_NH = ACTIVATIONS[activation].function(gate_NH.float().clamp_min(torch.finfo(torch.float32).min))
        by_best = threshold is None
        mask_NH = select_neurons_reference(active_NH, k).mask_NH if by_best else scores_of(active_NH) >= threshold
        mask_NH = mask_NH & (experts_N >= 0)[:, None]
        slots = k if threshold is None else gate_NH.size(1)
        ids_NS = (~mask_NH).int().argsort(dim=1, stable=True)[:, :slots]
        values_NS = (active_NH * probs_N.float()[:, None]).gather(1, ids_NS)
        kept = Kept(gate_NH.new_empty(ids_NS.shape, dtype=torch.int32).copy_(ids_NS), values_NS, mask_NH.sum(1).int())
        if self.spoil_lists:
            self.spoil_lists(kept)
        return kept

    def up_down(
        self, x_TD: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, experts_N: torch.Tensor, kept: Kept
    ) -> Any:
        out_TD = torch.zeros_like(x_TD)
        for row, (expert, count) in enumerate(zip(experts_N.tolist(), kept.counts_N.tolist(), strict=True)):
            ids, values = kept.ids_NS[row, :count].long(), kept.values_NS[row, :count]
            token = row // (len(experts_N) // len(x_TD))
            for part, value in zip(ids, values, strict=True):  # in one order, whatever the other rows are
                out_TD[token] += (gate_up[expert, 1, part] * x_TD[token]).sum() * value * down[expert, part]
        if self.spoil_out:
            self.spoil_out(out_TD)
        return out_TD


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_right_lists_pass(dtype: str, activation: str) -> None:
    records = list(decode_checks.check_lists(dtype, activation, checks.SMALL, "cpu", Few()))
    assert len(records) == 4 + 2 + 2 * 3
    assert [record["name"] for record in records if not record["passed"]] == []


def swap(kept: Kept) -> None:
    kept.ids_NS[0, [0, 1]] = kept.ids_NS[0, [1, 0]]


def drop(kept: Kept) -> None:
    kept.counts_N[0] -= 1


def take_others(kept: Kept) -> None:
    dropped = sorted(set(range(SHAPE.neurons)) - set(kept.ids_NS[0].tolist()))
    kept.ids_NS[0] = torch.tensor(dropped[: kept.ids_NS.size(1)])


def take_last_of_equals(kept: Kept) -> None:
    row = checks.make_inputs(SHAPE, torch.float32, 0, "cpu").names.index("equal")
    kept.ids_NS[row] += SHAPE.neurons - K


def add_to_values(kept: Kept) -> None:
    kept.values_NS[0] *= 1.001


def keep_rows_of_other_ranks(kept: Kept) -> None:
    kept.counts_N[-1] = 1


@pytest.mark.parametrize(
    ("quantity", "spoil"),
    [
        ("lists", swap),
        ("lists", drop),
        ("lists", keep_rows_of_other_ranks),
        ("which kept", take_others),
        ("ties", take_last_of_equals),
        ("values", add_to_values),
    ],
)
def test_wrong_lists_fail(quantity: str, spoil: Callable[[Kept], None]) -> None:
    record = next(decode_checks.check_lists("fp32", "silu", (SHAPE,), "cpu", Few(spoil)))
    assert not record["passed"]
    share = record["shares"][quantity]
    assert share == "infinite" or share > 1


def test_wrong_products_fail() -> None:
    def last(out_TD: torch.Tensor) -> None:
        out_TD[-1] *= 1.001

    arguments = ("fp32", 16, 20, "cpu")
    right = list(decode_checks.check_products(*arguments, Few()))
    assert [record["passed"] for record in right] == [True] * 5
    wrong = list(decode_checks.check_products(*arguments, Few(None, last)))
    assert [record["passed"] for record in wrong] == [False] * 5

    again = iter(range(1000))

    def differently(out_TD: torch.Tensor) -> None:
        out_TD += 1e-7 * next(again)

    for record in decode_checks.check_products(*arguments, Few(None, differently)):
        assert record["shares"]["same bits again"] == "infinite"
        assert record["shares"]["same bits alone"] == "infinite"


def test_wrong_backends_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Dense):
        def compute(self, *arguments: Any) -> ExpertOutput:
            output = super().compute(*arguments)
            return output._replace(out_ND=output.out_ND * 1.05)

    monkeypatch.setitem(BACKENDS, "decode", BACKENDS["loop"])
    arguments = ("cpu", ("bf16", "fp32"), 16, 40, (50, 16))
    assert [record["passed"] for record in decode_checks.check_backends(*arguments)] == [True] * 18
    for name in ("decode", "grouped"):
        monkeypatch.setitem(BACKENDS, name, Wrong(BACKENDS["grouped"].gemm))  # type: ignore[attr-defined]
    assert [record["passed"] for record in decode_checks.check_backends(*arguments)] == [False] * 18


def test_losses_are_compared_step_by_step() -> None:
    assert compare_losses("it", [8.0, 7.999], [8.00001, 8.0])["passed"]
    for ours, step in (([8.001, 8.0], "step 1"), ([8.0, 8.1], "step 2")):
        record = compare_losses("it", ours, [8.0, 8.0])
        assert not record["passed"]
        assert record["row"] == step


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


def test_few_rows_have_a_table(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", {"gpu": None}, interpreted=True)
    for contender, ratio, rows, median in (
        ("plain MoE", 1.0, 1, 20.0),
        ("skipping", 0.25, 1, 15.0),
        ("skipping", 0.25, 8, 30.0),
    ):
        shape = {"what": "few rows", "shape": "D=1", "contender": contender, "ratio": ratio, "rows": rows, "passed": True}
        times = {"microseconds": {"median": median}, "graph": rows == 1}
        report.add({"kind": "measurement", "group": "few rows", "name": contender, **shape, **times})
    tables = report.tables()
    assert "| plain MoE | 1     | 20.0 (1.00) |        |" in tables
    assert "| skipping  | 0.25  | 15.0 (0.75) | 30.0 * |" in tables


def test_what_training_needs_is_said(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", {"gpu": None}, interpreted=True)
    gpu.train(("mone_small", "mone_925m"), report, time.time() + 60, "megatron not installed")
    gpu.train(("mone_small",), report, time.time() - 60, None)
    skipped = {record["name"]: record["reason"] for record in report.content["skipped"]}
    assert [record["reason"] for record in report.content["skipped"]] == ["megatron not installed"] * 6 + [
        "no time left"
    ] * 4
    assert "training: mone_925m, ratio 0.25" in skipped
    assert report.content["measurements"] == []


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "it needs an NVIDIA GPU, torch built for CUDA, and triton" in line


@pytest.mark.parametrize(("triton", "numpy", "code"), [("3.6.0", "2.4.0", 2), ("3.6.0", "2.3.5", 0), ("3.7.1", "2.5.5", 0)])
def test_the_interpreter_refuses_versions_that_do_not_work_together(
    triton: str, numpy: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    for name, version in {"triton": triton, "numpy": numpy}.items():
        monkeypatch.setattr(pytest.importorskip(name), "__version__", version)
    for tasks in ("check_tasks", "measurement_tasks"):
        monkeypatch.setattr(gpu, tasks, lambda *_, **__: [])
    monkeypatch.setattr(gpu, "train", lambda *_: None)
    assert gpu.main(["--interpret", "--output", str(tmp_path / "gpu.json")]) == code
    assert ("fails with NumPy" in capsys.readouterr().err) == (code == 2)


def test_a_failure_is_recorded_and_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # undone afterwards, as are the handlers
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "check_tasks", lambda **_: [Task("broken", "check", int, ("x",))])  # type: ignore[arg-type]
    monkeypatch.setattr(gpu, "measurement_tasks", lambda *_, **__: [])
    monkeypatch.setattr(gpu, "train", lambda *_: None)
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
    groups = ["silu bf16", "silu edges", "operators", "experts", "lists silu fp16", "few rows fp16", "backends", "training"]
    assert {record["group"] for record in content["checks"]} == set(groups)
    assert all(record["passed"] for record in content["checks"] + content["measurements"])
    speeds = [record for record in content["measurements"] if record["what"] in ("experts", "select_and_gate")]
    measured = {(record["what"], record["contender"], record["ratio"]) for record in speeds}
    names = ["ours", "torch", "torch compiled", "ours compiled"]
    ratios = [1.0, 0.5, 0.25, 0.125]
    experts = {("experts", name, ratio) for name in names for ratio in ratios}
    selection = {("select_and_gate", name, ratio) for name in names[:3] for ratio in ratios}
    assert measured == experts | selection - {("select_and_gate", "ours", 1.0)}
    few = [record for record in content["measurements"] if record["what"] == "few rows"]
    assert {(record["contender"], record["ratio"], record["rows"]) for record in few} == {
        (name, ratio, rows)
        for rows in (1, 2)
        for name, its in (("plain MoE", [1.0]), ("dense, selecting", [0.5, 0.25, 0.1]), ("skipping", [1.0, 0.5, 0.25, 0.1]))
        for ratio in its
    }
    for record in few:
        if record["contender"] == "skipping" and record["rows"] == 1:
            assert record["share_read"] == pytest.approx(record["bound"], abs=0.01)  # K is rounded
    steps = [record for record in content["measurements"] if record["what"] == "training step"]
    assert [(record["model"], record["ratio"]) for record in steps] == [("mone_tiny", 1.0), ("mone_tiny", 0.25)]
    assert [record["name"] for record in content["skipped"]] == ["Transformer Engine"]
    count = len(content["checks"])
    assert f"{count} of {count} checks passed" in done.stdout
