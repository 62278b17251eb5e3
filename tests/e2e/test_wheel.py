"""The wheel works outside the checkout: console scripts, packages, configuration files."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mone_common.commands import PACKAGES
from tests.conftest import ROOT
from tests.tiny import make_shards

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content and scripts, built from a copy without leftovers of earlier builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)], check=True, cwd=folder
    )
    (wheel,) = folder.glob("mone-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, cwd=folder)
    return folder / "site"


def run(site: Path, *command: str, folder: Path | None = None) -> str:
    """The output of a command; folder: put before the wheel on the path, for the command and its children."""
    path = str(site) if folder is None else f".:{site}"
    done = subprocess.run(
        command,
        cwd=folder or site.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_packages_are_imported_from_the_wheel(site: Path) -> None:
    code = "import configs, data_prep, launch, train, mone_model; print(train.__file__, mone_model.__file__)"
    assert run(site, sys.executable, "-c", code).count(str(site)) == 2
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"bin", *PACKAGES}


def test_vllm_finds_the_plugin(site: Path) -> None:
    code = "from importlib.metadata import entry_points; "
    code += "print(entry_points(group='vllm.general_plugins')['mone'].load().__module__)"
    assert run(site, sys.executable, "-c", code).strip() == "mone_model.vllm.plugin"


def test_pretrain_composes_its_configuration(site: Path) -> None:
    composed = run(site, str(site / "bin/mone-pretrain"), "experiment=demo", "--cfg", "job")
    assert "activation_ratio: 0.25" in composed
    assert "data/demo/shards/bible" in composed
    launcher = run(site, str(site / "bin/mone-pretrain"), "hydra/launcher=slurm", "--cfg", "hydra")
    assert "hydra_plugins.mone_launchers.SlurmLauncher" in launcher


def test_pretrain_trains_from_the_wheel(site: Path) -> None:
    make_shards(site.parent / "shards")
    options = ["data.blend=[{path: shards}]", "model.hidden_size=48", "model.seq_length=32", "training.steps=2"]
    options += ["optimizer.warmup_steps=1", "training.global_batch_size=4", "logging.wandb_mode=disabled"]
    assert "complete" in run(site, str(site / "bin/mone-pretrain"), *options)
    assert (site.parent / "runs/mone/checkpoints/step-00000002/mone.json").exists()


@pytest.fixture(scope="module")
def hostile(site: Path) -> Path:
    """A folder with files of our packages' names; importing one ends the process."""
    folder = site.parent / "hostile"
    folder.mkdir()
    make_shards(folder / "shards")
    for name in ("train", "launch", "data_prep", "mone_model"):
        (folder / f"{name}.py").write_text("raise SystemExit('a file of the current folder was imported')")
    for name in ("configs", "hydra_plugins"):
        (folder / name).mkdir()
        (folder / name / "pretrain.yaml").write_text("a: 1")
    (folder / "configs/__init__.py").write_text("raise SystemExit('a file of the current folder was imported')")
    return folder


def test_a_sweep_trains_in_a_folder_with_files_of_our_packages_names(site: Path, hostile: Path) -> None:
    options = ["--multirun", "run.seed=1,2", "data.blend=[{path: shards}]", "model.hidden_size=48", "model.seq_length=32"]
    options += ["training.steps=20", "run.stop_at_step=1", "training.global_batch_size=4", "logging.wandb_mode=disabled"]
    output = run(site, str(site / "bin/mone-pretrain"), *options, "hydra.launcher.jobs=2", folder=hostile)
    assert "sweep: 2 stopped" in output
    assert "2 steps of warm-up" in (hostile / "runs/mone/seed=1/log.txt").read_text()


def test_python_m_reports_a_shadowing_file(site: Path, hostile: Path, tmp_path: Path) -> None:
    for file, module in {
        "configs/__init__.py": "train.pretrain",
        "launch.py": "data_prep.tokenize",
        "hydra_plugins/__init__.py": "launch.status",
    }.items():
        folder = tmp_path / module / file.partition("/")[0]
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        package = file.partition("/")[0].removesuffix(".py")
        assert line.startswith(f"error: {folder / file} shadows this project's package `{package}` in {site}; ")


# Text that the --help of each script must contain.
OPTIONS = {
    "mone-pretrain": "activation_ratio",
    "mone-import": "source=models/qwen",
    "mone-plan": "cluster.gpu",
    "mone-slurm": "launch.nodes",
    "mone-status": "--json",
    "mone-report": "--output",
    "mone-sample": "max_new_tokens",
    "mone-evaluate": "task_data",
    "mone-sparsify": "calibration_share",
    "mone-export": "max_shard_size",
    "mone-calibrate": "per=layer",
    "mone-train-tokenizer": "vocab_size",
    "mone-tokenizer": "vocab_size",
    "mone-tokenize": "shard_tokens",
    "mone-verify": "path",
}
# Runs each script with --help in a fork, which reuses the imports from the wheel.
EVERY_SCRIPT = """
import os, runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import data_prep.tokenize, data_prep.verify, launch.plan, launch.report, launch.slurm, launch.status, train.calibrate
import mone_eval.evaluate, mone_eval.sparsify, mone_model.hf.import_model
for script in sys.argv[1:]:
    print(f"== {os.path.basename(script)}", flush=True)
    child = os.fork()
    if child == 0:
        sys.argv = [script, "--help"]
        runpy.run_path(script, run_name="__main__")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, script
"""


def test_every_script_explains_its_options_in_any_folder(site: Path, hostile: Path) -> None:
    scripts = sorted(path for path in (site / "bin").iterdir() if path.name.startswith("mone-"))
    assert {script.name for script in scripts} == OPTIONS.keys() == PROJECT["scripts"].keys()
    shown = run(site, sys.executable, "-P", "-c", EVERY_SCRIPT, str(site), *map(str, scripts), folder=hostile)
    helps = {name: text for name, _, text in (part.partition("\n") for part in shown.split("== ")[1:])}
    for script, option in OPTIONS.items():
        assert option in helps[script]


def test_dependencies_are_bounded_by_what_was_run() -> None:
    """A plain `pip install` does not install an untested series."""
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for requirement in map(Requirement, PROJECT["dependencies"]):
        if requirement.name == "triton":  # each torch for CUDA pins its own
            continue
        major, minor, *_ = Version(tested[requirement.name]).release
        assert requirement.specifier.contains(tested[requirement.name])
        assert not requirement.specifier.contains(f"{major + 1}.0"), requirement
        if requirement.name in ("torch", "megatron-core", "deepspeed", "hydra-core", "omegaconf"):  # private APIs are used
            assert not requirement.specifier.contains(f"{major}.{minor + 1}"), requirement


def test_a_plain_install_resolves_to_the_series_that_were_run(tmp_path: Path) -> None:
    """Resolve without constraints on this Python; installs nothing."""
    report = tmp_path / "report.json"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--retries",
        "1",
    ]
    done = subprocess.run(
        [*pip, f"--report={report}", *PROJECT["dependencies"]], capture_output=True, text=True, timeout=300
    )
    if re.search("connection|No matching distribution found|Temporary failure|timed out", done.stderr, re.IGNORECASE):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]}
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    series = "0.16" if sys.version_info < (3, 12) else "0.19"  # both were run; 0.19 needs Python 3.12
    assert found["megatron-core"].startswith(f"{series}.")
    # The constraints have no triton: on Python 3.11 nothing needs it.
    pinned = found.keys() - {"triton"}
    assert {name: Version(found[name]).major for name in pinned} == {name: Version(tested[name]).major for name in pinned}
