"""vLLM's experts for GPUs: values in Triton's interpreter, the switch, refused layouts, and where the plugin takes them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import ENVIRONMENT


@pytest.fixture(scope="module")
def results(vllm_python: Path) -> dict[str, Any]:
    """What tests/vllm/gpu_experts.py found."""
    script = Path(__file__).parent / "gpu_experts.py"
    environment = os.environ | ENVIRONMENT
    done = subprocess.run([vllm_python, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_they_equal_the_loop_over_experts(results: dict[str, Any]) -> None:
    assert len(results["errors"]) == 3 * 3 * 2
    assert {name: error for name, error in results["errors"].items() if not error < 1e-5} == {}


def test_a_shared_expert_equals_the_loop(results: dict[str, Any]) -> None:
    assert results["shared"] < 1e-4


def test_skipping_ends_where_dense_products_are_as_fast(results: dict[str, Any]) -> None:
    assert results["measured"] == [4, 0, 64]


def test_layouts_that_they_cannot_compute_are_refused(results: dict[str, Any]) -> None:
    best, batched, lora, long = results["refusals"]
    assert best.startswith("tensor_parallel_size=2: the K best of neurons on several GPUs are not supported; use --enable-")
    assert batched.startswith("all2all_backend=deepep_low_latency: sends tokens in a form that the plugin does not read")
    assert lora.startswith("enable_lora=True: the plugin mone has no LoRA")
    assert long.startswith("intermediate_size=16385: the kernels of the plugin mone select from at most 16384 neurons")


def test_the_plugin_takes_them_where_there_is_cuda(results: dict[str, Any]) -> None:
    assert results["chosen"] == ["TRITON", "NeuronTritonExperts"]
