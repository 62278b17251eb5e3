"""launch/torchrun on two machines, simulated by network namespaces."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mone_common.run_records import read_metrics, read_status
from tests.conftest import ROOT
from tests.faults.jobs import OPTIONS, make_data

ADDRESSES = {"mone-a": "10.77.0.1", "mone-b": "10.77.0.2"}
STEPS = 60


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[None]:
    """Two network namespaces connected by a veth pair."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    first, second = ADDRESSES
    unplug()
    try:
        for name in ADDRESSES:
            ip("netns", "add", name)
        ip("link", "add", "mone-a0", "netns", first, "type", "veth", "peer", "name", "mone-b0", "netns", second)
        for name, address in ADDRESSES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"{name}0", "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted: {error.stderr}")
    finally:
        unplug()


def unplug() -> None:
    for name in ADDRESSES:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", name)


def test_two_machines_train_one_model_and_survive_a_crash_on_one(machines: None, tmp_path: Path) -> None:
    make_data(tmp_path)
    run, agents = tmp_path / "runs/both", dict[str, psutil.Popen]()
    options = ["evaluation.interval=0", "checkpoint.interval=10", f"training.steps={STEPS}", "run.name=both"]
    command = ["bash", str(ROOT / "launch/torchrun"), *OPTIONS, *options, "data.blend=[{path: a}]"]
    for name, address in ADDRESSES.items():
        here = {"NODES": "2", "HEAD": f"{ADDRESSES['mone-a']}:29500", "PROCESSES": "1", "RESTARTS": "1", "ADDRESS": address}
        with open(tmp_path / f"{name}.log", "w") as log:
            agents[name] = psutil.Popen(
                ["ip", "netns", "exec", name, *command],
                cwd=tmp_path,
                env={
                    **os.environ,
                    **here,
                    "PYTHON": sys.executable,
                    "PYTHONPATH": str(ROOT),
                    "PYTHONUNBUFFERED": "1",
                    "OMP_NUM_THREADS": "1",
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def logs() -> str:
        return "\n".join((tmp_path / f"{name}.log").read_text() for name in ADDRESSES)

    try:
        began = time.monotonic()
        while max((record["step"] for record in read_metrics(run)), default=0) < 11:
            assert time.monotonic() - began < 400, logs()
            time.sleep(0.05)
        workers = [child for child in agents["mone-b"].children(recursive=True) if "RANK" in child.environ()]
        # The oldest is the training process; the others help with its saves and exit with it.
        min(workers, key=lambda worker: worker.create_time()).kill()
        for agent in agents.values():
            assert agent.wait(timeout=600) == 0, logs()
    finally:
        for agent in agents.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*agent.children(recursive=True), agent]:
                    process.kill()
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert read_status(run)["state"] == "complete"
    assert [record["step"] for record in read_metrics(run) if "train/loss" in record] == list(range(1, STEPS + 1))
    assert re.search(r"resumed from runs/both/checkpoints/step-000000\d0 ", logs())
