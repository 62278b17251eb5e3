"""Check and measure the kernels on a machine with an NVIDIA GPU, in under five minutes.

    make gpu                                          # or: python -m benchmarks.gpu
    python -m benchmarks.gpu --output gpu.json --minutes 10
    python -m benchmarks.gpu --interpret              # without a GPU: tiny shapes in Triton's interpreter, no times

It needs torch and triton and nothing else; with Megatron-Core it also times a training step. It checks values and gradients
of the Triton kernels against their references, then measures `select_and_gate` and whole experts. Exit code: 0 if all is
well, 1 if a check or a measurement failed, 2 if it cannot run here.
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
    for task in measurement_tasks(deadline, interpret=options.interpret):
        # Its results come at the end.
        follow([task], report, timeout=WAIT + 60 * options.minutes)
    missing = [name for name in ("megatron", "hydra", "omegaconf") if importlib.util.find_spec(name) is None]
    reason = f"{', '.join(missing)} not installed" if missing else "not in the interpreter" if options.interpret else None
    if reason or time.time() > deadline:
        report.add({"kind": "skipped", "name": "training step of mone_small", "reason": reason or "no time left"})
    else:
        from benchmarks.gpu.measurements import measure_step

        follow([Task("training step", "measurement", measure_step, ("mone_small", "bf16", 15))], report)
    report.content["machine_afterwards"] = describe_machine()["nvidia_smi"]
    report.save(complete=True)
    print(f"\n{report.tables()}\n")
    for record in report.failures:
        print(f"FAILED: {record['group']}: {record['name']}")
    passed = sum(record["passed"] for record in report.content["checks"])
    report.say(f"{passed} of {len(report.content['checks'])} checks passed; everything is in {options.output}")
    return 1 if report.failures else 0


def _end(number: int, _: Any) -> None:
    """End the processes of the tasks and this one; the file has what was found until now."""
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(128 + number)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("report/gpu.json"), help="JSON file (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=4.5, help="start no measurement after so many minutes (default: %(default)s)"
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
    return None


def check_tasks(*, interpret: bool) -> list[Task]:
    """The checks, each group in a process of its own."""
    from benchmarks.gpu.checks import DTYPES, LONG, SMALL, Shape, check_edges, check_selection
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
        *(
            task(f"{activation} {dtype}", check_selection, dtype, activation, SMALL, 8, "cuda")
            for activation in ACTIVATIONS
            for dtype in DTYPES
        ),
        *(task(f"{activation} edges", check_edges, "fp32", activation, "cuda") for activation in ACTIVATIONS),
    ]


def measurement_tasks(deadline: float, *, interpret: bool) -> Iterator[Task]:
    """The measurements, each shape in a process of its own, one at a time; the time left is shared among those to come."""
    from benchmarks.gpu.measurements import LAYERS, TINY, measure, measure_ceilings

    how = ("cpu", "aot_eager") if interpret else ("cuda", "inductor")
    if not interpret:
        yield Task("ceilings", "measurement", measure_ceilings)
    shapes = [(what, layer) for layer in ([TINY] if interpret else LAYERS) for what in ("experts", "select_and_gate")]
    for position, (what, layer) in enumerate(shapes):
        now = time.time()
        until = now + (deadline - now) / (len(shapes) - position)
        yield Task(f"{what}, {layer}", "measurement", measure, (what, layer, until, *how))


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
