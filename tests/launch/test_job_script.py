"""The job script of launch.slurm: quoting of values, absence of secrets, and the commands that it starts."""

import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.options import SlurmOptions
from launch.slurm import main
from tests.conftest import ROOT
from tests.faults.jobs import OPTIONS, make_data
from train.pretrain import main as pretrain

# A namespace package, which mypy would find under a second name.
SlurmLauncherConfig = importlib.import_module("hydra_plugins.mone_launchers").SlurmLauncherConfig
Call = Callable[..., tuple[int, str, str]]
CPU: dict[str, Any] = {"gpus_per_node": 0, "processes_per_node": 1}
LAUNCH = ("launch.nodes=2", "launch.gpus_per_node=0", "launch.processes_per_node=1")
DATA = "data.blend=[{path: a}]"
TEXTS = ("memory_per_node", "partition", "account", "qos", "constraint", "container", "python")
LISTS = ("container_mounts", "modules", "setup")
SECRET = "hunter2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    make_data(folder)
    return folder


@pytest.fixture
def slurm(call_main: Call, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Call:
    """Print the job script of a tiny run."""
    monkeypatch.chdir(folder)
    return lambda *options: call_main(main, DATA, *OPTIONS, *LAUNCH, "--dry-run", *options)


@pytest.mark.parametrize("kind", [SlurmOptions, SlurmLauncherConfig])
@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028", "\udc80"])
def test_control_characters_are_refused(kind: type[SlurmOptions], character: str) -> None:
    bad = f"a{character}touch owned"
    texts: dict[str, Any] = (
        {name: bad for name in TEXTS} | {name: ["fine", bad] for name in LISTS} | {"sbatch": [f"--{bad}"]}
    )
    for name, value in texts.items():
        with pytest.raises(
            ValueError, match=rf"^{kind.section}\.{name}: contains a line break or another control character"
        ):
            kind(**CPU, **{name: value})
    with pytest.raises(
        ValueError, match=rf"^{kind.section}\.environment\.A: contains a line break or another control character"
    ):
        kind(**CPU, environment={"A": bad})
    names: dict[str, Any] = {"environment": {f"A{character}B": "1"}, "pass_environment": [f"A{character}B"]}
    for name, variables in names.items():
        with pytest.raises(ValueError, match=rf"^{kind.section}\.{name}='A.+B': is not a name of an environment variable"):
            kind(**CPU, **{name: variables})


@pytest.mark.parametrize("name", ["A-B", "1A", "A B", "é", "", "A;touch owned"])
def test_invalid_names_of_variables_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^launch\.environment=.*: is not a name of an environment variable"):
        SlurmOptions(**CPU, environment={name: "1"})


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"environment": {name: SECRET}}
            for name in (
                *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "MYSQL_PWD", "GITHUB_PAT"),
                *("apiKey", "google_credentials", "TOKEN2", "SSH_PASSPHRASE", "HTTP_AUTH", "SSHPASS", "PASSCODE", "CREDS"),
                *("JWT", "BEARER", "AUTHORIZATION", "AZURE_SAS", "CONNECTION_STRING", "DATABASE_URL", "AccountKey"),
            )
        ),
        {"environment": {"https_proxy": f"http://me:{SECRET}@proxy:80"}},
        {"setup": ["module list", f"export WANDB_API_KEY={SECRET}"]},
        {"setup": [f"HF_TOKEN='{SECRET}' tool"]},
        {"setup": [f"wandb login --relogin {SECRET}"]},
        {"setup": [f"huggingface-cli login --token {SECRET}"]},
        {"setup": [f"curl -H 'Authorization: Bearer {SECRET}' https://host"]},
        {"setup": [f'curl -H "X-Api-Key:{SECRET}" https://host']},
        {"setup": [f"curl -s -u me:{SECRET} https://host"]},
        {"setup": [f"export X_API_KEY=$'{SECRET}'"]},
        {"setup": [f"setenv X_API_KEY {SECRET}"]},
        {"sbatch": [f"--export=ALL,WANDB_API_KEY={SECRET}"]},
    ],
)
@pytest.mark.parametrize("kind", [SlurmOptions, SlurmLauncherConfig])
def test_secrets_are_refused_by_name_and_not_printed(kind: type[SlurmOptions], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{kind.section}\.(environment|setup|sbatch).*{kind.section}\.pass_env") as error:
        kind(**CPU, **options)
    assert SECRET not in str(error.value)


def test_names_that_resemble_secrets_are_accepted() -> None:
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_IB_PKEY": "1",
        "WANDB_API_KEY_FILE": "/home/me/key",
        "KEYBOARD": "us",
        "SSH_AUTH_SOCK": "/tmp/agent",
        "PATH_": "/a:/b",
        "https_proxy": "http://proxy:80",
    }
    setup = ["export WANDB_API_KEY=$(cat ~/.wandb)", 'export HF_TOKEN="$TOKEN"', "unset HF_TOKEN"]
    setup += ['wandb login "$WANDB_API_KEY"', "hf login --token $HF_TOKEN", ': "${HF_TOKEN:?is not set}"', "wandb login"]
    setup += ["curl -H 'Authorization: Bearer '$T https://host", 'curl -u "me:$T" https://host', "docker run -u 1000:1000 a"]
    SlurmOptions(**CPU, environment=environment, setup=setup, sbatch=["--exclusive", "--export=ALL"])


@pytest.mark.parametrize("plus", ["", "+"])
def test_a_secret_on_the_command_line_ends_it_before_anything_is_written(slurm: Call, folder: Path, plus: str) -> None:
    code, out, error = slurm(f"{plus}launch.environment.WANDB_API_KEY={SECRET}")
    assert (code, out) == (2, "")
    assert "error: launch.environment.WANDB_API_KEY: WANDB_API_KEY would be written to the job script" in error
    assert SECRET not in error
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "option",
    [
        "launch.environment.FOO=${oc.env:WANDB_API_KEY}",
        "launch.setup=['tool ${oc.env:WANDB_API_KEY}']",
        f"launch.environment.FOO={SECRET}",
        f"launch.pass_environment=['WANDB_API_KEY={SECRET}']",
        f"launch.enviroment.WANDB_API_KEY={SECRET}",
        f"WANDB_API_KEY={SECRET}",
        f"launch.environment.WANDB_API_KEY='{SECRET}",
        f"launch.environment={{A: {{WANDB_API_KEY: {SECRET}}}}}",
        f"launch.environment={{WANDB_API_KEY: {SECRET}(}}",
        f"launch.environment.WANDB_API_KEY={SECRET},b",
        f"launch.environment.WANDB_API_KEY=[{SECRET}]",
        f"--api-key={SECRET}",
        f"--api-key={SECRET}\udcff",
    ],
)
def test_no_message_shows_a_secret(slurm: Call, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    code, out, error = slurm(option)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert SECRET not in error
    name, equals, _ = option.partition("=")
    assert f"{name.rpartition('.')[2]}{equals}".strip("-") in error or "launch." in error


def test_the_command_in_the_script_is_without_secrets(slurm: Call) -> None:
    code, script, error = slurm(f"deepspeed.options={{monitor: {{api_key: {SECRET}}}}}", "run.name=shown")
    assert (code, error) == (0, "")
    assert SECRET not in script
    assert "deepspeed.options={monitor: {api_key: ***" in script
    assert "run.name=shown" in script


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("launch.cpus_per_node=-5", "launch.cpus_per_node=-5: must be null or at least 1"),
        ("launch.cpus_per_node=0", "launch.cpus_per_node=0: must be null or at least 1"),
        ("launch.python=''", "launch.python='': must be the path of an interpreter"),
        ("launch.time='\uff11\uff12:00:00'", "launch.time=\uff11\uff12:00:00: must have Slurm's format"),
    ],
)
def test_values_that_slurm_rejects_are_refused(slurm: Call, option: str, message: str) -> None:
    code, out, error = slurm(option)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {message}")


@pytest.mark.parametrize("plus", ["", "+"])
def test_a_secret_of_a_sweep_is_refused(call_main: Call, monkeypatch: pytest.MonkeyPatch, folder: Path, plus: str) -> None:
    monkeypatch.chdir(folder)
    sweep = ["--multirun", DATA, *OPTIONS, "run.seed=1,2", "hydra/launcher=slurm", "hydra.launcher.dry_run=true"]
    launch = [f"hydra.{option.replace('launch.', 'launcher.')}" for option in LAUNCH]
    code, out, error = call_main(pretrain, *sweep, *launch, f"{plus}hydra.launcher.environment.HF_TOKEN={SECRET}")
    assert (code, out) == (2, "")
    assert "error: hydra.launcher.environment.HF_TOKEN: HF_TOKEN would be written to the job script" in error
    assert SECRET not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["launch.account='mine\ntouch owned'"], "launch.account: contains a line break"),
        (["run.name='a\ntouch owned'", "run.dir=runs/a"], "run.name='a\\ntouch owned'"),
        (["run.dir='runs/a\ntouch owned'"], "run.dir='runs/a\\ntouch owned'"),
        (["run.name=../../x"], "run.name=../../x: names a folder below runs/"),
        (["run.dir=."], "run.dir=.: is the current or the home folder"),
        (["run.dir=runs"], "run.dir=runs: is the folder that contains all runs"),
    ],
)
def test_invalid_names_and_folders_are_refused(slurm: Call, options: list[str], message: str) -> None:
    code, out, error = slurm(*options)
    assert (code, out) == (2, "")
    assert f"error: {message}" in error


@pytest.mark.parametrize("name", ["a\ntouch owned", "a\udcff"])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_current_folder_with_control_characters_is_refused(
    slurm: Call, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, name: str, absolute: bool
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    code, out, error = slurm(f"data.blend=[{{path: {folder}/a}}]", f"run.dir={tmp_path}/run" if absolute else "run.dir=run")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert ascii(name)[1:-1] in error


FAKES = {
    "scontrol": 'case $* in *hostnames*) echo n1;; *) echo "Node NodeAddr=10.0.0.1 ";; esac',
    "getent": "true",
    # The environment of a process can be read by its owner only.
    "srun": 'echo "SRUN $*" > "$SEEN/arguments"; echo "$JOB" > "$SEEN/job"; echo "$PYTHONPATH" > "$SEEN/path"',
    "python": "exit 0",
}


def run_script(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a job script with fake programs that record their arguments in `tmp_path`."""
    for name, body in FAKES.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SEEN": str(tmp_path)}
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", script], env={**path, **variables, **environment}, capture_output=True, text=True, timeout=60
    )


def test_each_start_has_a_new_secret_rendezvous_id(slurm: Call, tmp_path: Path) -> None:
    code, script, _ = slurm("launch.python=python", "launch.environment.PYTHONPATH=elsewhere")
    assert code == 0
    found = []
    for restart in ("0", "1"):
        done = run_script(script, tmp_path, SLURM_RESTART_COUNT=restart)
        assert done.returncode == 0, done.stderr
        assert f"== job 7.{restart} on n[1-2]" in done.stdout
        job = (tmp_path / "job").read_text().strip()
        assert re.fullmatch(r"[0-9a-f]{32}", job)
        assert job not in script + done.stdout + done.stderr + (tmp_path / "arguments").read_text()
        found.append(job)
    assert found[0] != found[1]
    # The frozen code comes first on the path.
    assert (tmp_path / "path").read_text().strip().endswith("/launch/code:elsewhere")


def test_a_job_without_a_variable_that_it_needs_ends_at_once(slurm: Call, tmp_path: Path) -> None:
    code, script, _ = slurm("launch.python=python", "launch.pass_environment=[WANDB_API_KEY]")
    assert code == 0
    lost = run_script(script, tmp_path)
    assert lost.returncode != 0
    assert "WANDB_API_KEY: not in the environment of this job" in lost.stderr
    assert not (tmp_path / "job").exists()
    assert run_script(script, tmp_path, WANDB_API_KEY=SECRET).returncode == 0


def test_a_variable_to_pass_must_be_set_where_the_job_is_submitted(
    call_main: Call, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/bash\necho 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    options = (DATA, *OPTIONS, *LAUNCH, "run.name=passed", "launch.pass_environment=[WANDB_API_KEY]")
    code, _, error = call_main(main, *options)
    assert code == 2
    assert "error: launch.pass_environment=WANDB_API_KEY: is not set in this environment; export it first" in error
    assert not (folder / "runs/passed").exists()
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert call_main(main, *options)[0] == 0
    written = [path.read_bytes() for path in (folder / "runs/passed").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in text for text in written)


@pytest.mark.parametrize("start", ["launch/torchrun", "elsewhere"])
def test_torchrun_uses_its_own_code_and_hides_the_id(tmp_path: Path, start: str) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/bash\necho "$*"; env\n')
    program.chmod(0o755)
    script = ROOT / "launch/torchrun"
    if start == "elsewhere":
        script = tmp_path / "link"
        script.symlink_to(ROOT / "launch/torchrun")
    several = {"NODES": "2", "HEAD": "10.0.0.1:29500", "JOB": SECRET, "PYTHON": str(program), "PYTHONPATH": "."}
    done = subprocess.run(
        ["bash", str(script), "run.name=a b"], cwd=tmp_path, env={**os.environ, **several}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    arguments, *environment = done.stdout.splitlines()
    assert SECRET not in arguments
    assert "--rdzv-endpoint=10.0.0.1:29500" in shlex.split(arguments)
    assert f"PET_RDZV_ID={SECRET}" in environment
    assert f"PYTHONPATH={ROOT}:." in environment
    assert "PYTHONSAFEPATH=1" in environment
    assert done.stderr == ""
    unset = subprocess.run(
        ["bash", str(script)], env={**os.environ, **several, "JOB": ""}, cwd=tmp_path, capture_output=True, text=True
    )
    assert "warning: JOB is not set: anyone who can reach 10.0.0.1:29500" in unset.stderr


@pytest.mark.parametrize(
    "refused",
    [
        f"hydra.launcher.environment.HF_TOKEN={SECRET}",
        f"run.name={SECRET}/../../x",
        "run.dir=.",
        "hydra.sweep.dir=/",
        f"hydra.sweep.dir='{SECRET}\na'",
        "hydra.launcher.dry_run=true",
        "data.blend=[]",
    ],
)
def test_a_sweep_that_submits_nothing_writes_nothing(
    call_main: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, refused: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["--multirun", f"data.blend=[{{path: {folder}/a}}]", *OPTIONS, "run.seed=1,2", "hydra/launcher=slurm"]
    launch = [f"hydra.{option.replace('launch.', 'launcher.')}" for option in LAUNCH]
    code, _, error = call_main(pretrain, *sweep, *launch, refused)
    assert code == (0 if "dry_run" in refused else 2), error
    assert error.count("error: ") == (code != 0)
    assert list(tmp_path.iterdir()) == []
    assert not Path("/multirun.yaml").exists()
