"""The wheel works outside the checkout: console scripts, packages, configuration files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tiny import make_shards


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content and scripts, built from a copy, so that no leftovers of a build go in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in ("configs", "data_prep", "hydra_plugins", "launch", "mone_model", "train"):
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


def run(site: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=site.parent, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packages_come_from_the_wheel(site: Path) -> None:
    code = "import configs, data_prep, launch, train, mone_model; print(train.__file__, mone_model.__file__)"
    assert run(site, sys.executable, "-c", code).count(str(site)) == 2


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


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("mone-pretrain", "model.activation_ratio"),
        ("mone-plan", "cluster.gpu"),
        ("mone-slurm", "launch.nodes"),
        ("mone-report", "--output"),
        ("mone-sample", "max_new_tokens"),
        ("mone-calibrate", "per=layer"),
        ("mone-tokenizer", "vocab_size"),
        ("mone-tokenize", "shard_tokens"),
        ("mone-verify", "path"),
    ],
)
def test_every_script_explains_its_options(site: Path, script: str, option: str) -> None:
    assert option in run(site, str(site / "bin" / script), "--help")
