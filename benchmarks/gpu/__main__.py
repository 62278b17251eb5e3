"""Check and measure what runs on GPUs on a machine with an NVIDIA GPU, in under ten minutes.

    make gpu                                          # or: python -m benchmarks.gpu
    python -m benchmarks.gpu --output gpu.json --minutes 20
    python -m benchmarks.gpu --interpret              # without a GPU: tiny shapes in Triton's interpreter, no times

It needs torch and triton and nothing else. It checks values and gradients of the Triton kernels and of the expert backends
against their references, then measures `select_and_gate`, whole experts, and experts for a few rows. Where the project is
installed, it also compares losses with a CPU's and measures training steps. Exit code: 0 if all is well, 1 if a check or a
measurement failed, 2 if it cannot run here.
"""

# Not Hydra, as elsewhere: a machine with a GPU may have torch and triton alone.
import argparse
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.isolation import Record, Task, run
from benchmarks.gpu.report import Report, describe_machine

WAIT = 150.0  # seconds for one result: compiling a kernel takes a few
# Precision, sequences of a step, steps.
STEPS = {"mone_tiny": ("fp32", 1, 1), "mone_small": ("bf16", 8, 15), "mone_925m": ("bf16", 4, 10)}


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; the exit code."""
    options = _options(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes of the tasks, before they import Triton
    obstacle = _obstacle(interpret=options.interpret)
    if obstacle:
        print(f"benchmarks.gpu: {obstacle}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)

    report = Report(options.output, describe_machine(), interpreted=options.interpret)
    report.say(f"{report.content['machine']['gpu'] or 'no GPU'}, torch {report.content['machine']['versions']['torch']}")
    deadline = report.start + 60 * options.minutes
    # Most of a check is compiling.
    follow(
        check_tasks(interpret=options.interpret), report, workers=1 if options.interpret else min(12, os.cpu_count() or 1)
    )
    models = ("mone_tiny",) if options.interpret else ("mone_small", "mone_925m")
    missing = [name for name in ("megatron", "hydra", "omegaconf") if importlib.util.find_spec(name) is None]
    # Training takes a third of the time, if it can run.
    between = deadline if missing else report.start + 40 * options.minutes
    for task in measurement_tasks(between, interpret=options.interpret):
        # Its results come at the end.
        follow([task], report, timeout=WAIT + 60 * options.minutes)
    if importlib.util.find_spec("transformer_engine") is None:
        reason = "not installed; training steps use Megatron-Core's own layers"
        report.add({"kind": "skipped", "name": "Transformer Engine", "reason": reason})
    train(models, report, deadline, f"{', '.join(missing)} not installed" if missing else None)
    report.content["machine_afterwards"] = describe_machine()["nvidia_smi"]
    report.save(complete=True)
    print(f"\n{report.tables()}\n")
    for record in report.failures:
        print(f"FAILED: {record['group']}: {record['name']}")
    passed = sum(record["passed"] for record in report.content["checks"])
    report.say(f"{passed} of {len(report.content['checks'])} checks passed; everything is in {options.output}")
    return 1 if report.failures else 0


def train(models: tuple[str, ...], report: Report, deadline: float, obstacle: str | None) -> None:
    """Losses of the first model against a CPU's, and training steps of all; obstacle: why nothing of it can run."""
    from benchmarks.gpu.training import compare_losses, first_losses, measure_step

    places = ("here", "on the CPU")
    losses = [Task(f"losses {place}", "measurement", first_losses, (models[0], place, 4)) for place in places]
    steps = [
        Task(f"{model}, ratio {ratio:g}", "measurement", measure_step, (model, ratio, *STEPS[model]))
        for model in models
        for ratio in (1.0, 0.25)
    ]
    for tasks in (losses, *([step] for step in steps)):
        reason = obstacle or ("no time left" if time.time() > deadline else None)
        if reason is None:
            follow(tasks, report)
        for task in tasks if reason else ():
            report.add({"kind": "skipped", "name": f"training: {task.name}", "reason": reason})
    found = [record["losses"] for record in report.content["measurements"] if record.get("losses")]
    if len(found) == 2:
        report.add(compare_losses(models[0], *found))


def _end(number: int, _: Any) -> None:
    """End the processes of the tasks and this one; the file has what was found until now."""
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(128 + number)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("report/gpu.json"), help="JSON file (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=8, help="start no measurement after so many minutes (default: %(default)s)"
    )
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in Triton's interpreter: no GPU, no times")
    return parser.parse_args(arguments)


def _obstacle(*, interpret: bool) -> str | None:
    """Why it cannot run here, in one line."""
    needs = "it needs an NVIDIA GPU, torch built for CUDA, and triton"
    for package in ("torch", "triton", *(["numpy"] if interpret else [])):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; {needs}; --interpret needs torch, triton and numpy"
    import torch

    if not interpret and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU; {needs}; --interpret runs in Triton's interpreter"
    if interpret:
        import numpy
        import triton

        if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
            versions = f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}"
            return f"{versions}; install Triton 3.7 or 'numpy<2.4'"
    return None


def _release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_tasks(*, interpret: bool) -> list[Task]:
    """The checks, each group in a process of its own."""
    from benchmarks.gpu.checks import DTYPES, LONG, SMALL, Shape, check_edges, check_selection
    from benchmarks.gpu.decode_checks import check_backends, check_graphs, check_lists, check_products
    from benchmarks.gpu.operator_checks import check_experts, check_operators
    from mone_model.activations import ACTIVATIONS

    def task(name: str, function: Callable[..., Iterator[Record]], *arguments: Any) -> Task:
        return Task(name, "check", function, arguments)

    if interpret:
        return [
            task("silu bf16", check_selection, "bf16", "silu", (Shape(37, (5,)),), 0, "cpu"),
            task("silu edges", check_edges, "fp32", "silu", "cpu"),
            task("operators", check_operators, "cpu", "aot_eager"),
            task("experts", check_experts, "cpu", ("bf16",), 16, 32, 20),
            task("lists silu fp16", check_lists, "fp16", "silu", SMALL[:1], "cpu"),
            task("few rows fp16", check_products, "fp16", 32, 20, "cpu"),
            task("backends", check_backends, "cpu", ("fp32",), 16, 40, (50, 16)),
        ]
    # The longest first.
    return [
        *(
            task(f"silu {dtype} H={shape.neurons}", check_selection, dtype, "silu", (shape,), 8, "cuda")
            for shape in reversed(LONG)
            for dtype in DTYPES
        ),
        task("operators", check_operators, "cuda", "inductor"),
        task("experts", check_experts, "cuda", ("bf16", "fp32"), 256, 384, 500),
        task("backends", check_backends, "cuda", tuple(DTYPES), 256, 384, (400, 64)),
        task("CUDA graphs", check_graphs, 512, 384),
        *(
            task(f"few rows {dtype} D={width}", check_products, dtype, width, neurons, "cuda")
            for width, neurons in ((2048, 1408), (200, 100))
            for dtype in DTYPES
        ),
        *(
            check
            for activation in ACTIVATIONS
            for dtype in DTYPES
            for check in (
                task(f"{activation} {dtype}", check_selection, dtype, activation, SMALL, 8, "cuda"),
                task(f"lists {activation} {dtype}", check_lists, dtype, activation, SMALL, "cuda"),
            )
        ),
        *(task(f"lists {dtype} long", check_lists, dtype, "silu", LONG, "cuda") for dtype in DTYPES),
        *(task(f"{activation} edges", check_edges, "fp32", activation, "cuda") for activation in ACTIVATIONS),
    ]


def measurement_tasks(deadline: float, *, interpret: bool) -> Iterator[Task]:
    """The measurements, each shape in a process of its own, one at a time; the time left is shared among those to come."""
    from benchmarks.gpu.decode_measurements import measure_few_rows
    from benchmarks.gpu.measurements import LAYERS, TINY, measure, measure_ceilings

    device, compiler = ("cpu", "aot_eager") if interpret else ("cuda", "inductor")
    if not interpret:
        yield Task("ceilings", "measurement", measure_ceilings)
    layers = [TINY] if interpret else LAYERS
    shapes = [(what, layer) for layer in layers for what in ("few rows", "experts", "select_and_gate")]
    for position, (what, layer) in enumerate(shapes):
        now = time.time()
        until = now + (deadline - now) / (len(shapes) - position)
        if what == "few rows":
            yield Task(f"{what}, {layer}", "measurement", measure_few_rows, (layer, until, device))
        else:
            yield Task(f"{what}, {layer}", "measurement", measure, (what, layer, until, device, compiler))


def follow(tasks: list[Task], report: Report, workers: int = 1, timeout: float = WAIT) -> None:
    """Run tasks, so many at a time, and report as they go on."""
    done = 0

    def follow_one(task: Task) -> None:
        nonlocal done
        records = 0
        for record in run(task, timeout):
            records += 1
            report.add(record)
        done += 1
        report.say(f"{task.kind} {done} of {len(tasks)}: {task.name}: {records} results")
        report.save()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(follow_one, tasks))


if __name__ == "__main__":
    sys.exit(main())
