"""Command lines: one-line errors with exit code 2, text that is not read as numbers, help by section."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data_prep import tokenize, tokenizer_training, verify
from launch import plan, report, slurm, status
from mone_model.hf import import_model
from tests.conftest import ROOT
from tests.tiny import make_shards
from train import calibrate, pretrain, sample

COMMANDS: dict[str, Callable[[], None]] = {
    "pretrain": pretrain.main,
    "plan": plan.main,
    "slurm": slurm.main,
    "sample": sample.main,
    "calibrate": calibrate.main,
    "import": import_model.main,
    "tokenizer": tokenizer_training.main,
    "tokenize": tokenize.main,
    "verify": verify.main,
}
WITH_FLAGS: dict[str, Callable[[], None]] = {"status": status.main, "report": report.main}
"""Commands without options of the form NAME=VALUE."""


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (
            "pretrain",
            ["model.activation_ration=0.5"],
            ["model.activation_ration=0.5: no such", "model.activation_ratio"],
        ),
        ("pretrain", ["lr=1e-3"], ["did you mean optimizer.lr?"]),
        ("pretrain", ["optimiser.lr=1e-3"], ["did you mean optimizer.lr?"]),
        ("pretrain", ["foo.bar=1"], ["foo.bar=1: no such option; see --help"]),
        ("pretrain", ["+new=1"], ["+new=1: no such option"]),
        ("pretrain", ["++model.activation_ration=1"], ["did you mean model.activation_ratio"]),
        ("pretrain", ["~training.steps"], ["~training.steps: an option cannot be removed"]),
        ("pretrain", ["~foo"], ["~foo: no such option"]),
        ("pretrain", ["model=mone_tinny"], ["model=mone_tinny: no such choice", "mone_925m", "did you mean mone_tiny?"]),
        ("pretrain", ["experiment=dmeo"], ["experiment=dmeo", "k_sweep", "did you mean demo?"]),
        ("pretrain", ["data=mine"], ["data=mine: no such choice; choose from demo"]),
        ("pretrain", ["experiment=evidence/comon"], ["no such choice", "did you mean evidence/common?"]),
        ("pretrain", ["hydra/launcher=surm"], ["did you mean slurm?"]),
        ("pretrain", ["hydra.launcher.job=2"], ["did you mean hydra.launcher.jobs"]),
        ("tokenize", ["model=mone_tiny"], ["model=mone_tiny: this command has no such option"]),
        ("plan", ["tokens=100B"], ["tokens=100B: must be a number, like tokens=100e9, or null"]),
        ("pretrain", ["training.steps=1e3"], ["must be a whole number, like training.steps=1000"]),
        ("pretrain", ["training.steps=null"], ["training.steps=null: must be a whole number"]),
        ("pretrain", ["checkpoint.async_save=maybe"], ["checkpoint.async_save=maybe: must be true or false"]),
        ("pretrain", ["training=5"], ["training=5: must be given option by option, like training.steps=VALUE"]),
        ("pretrain", ["training={stepz: 5}"], ["no such option as stepz; did you mean steps?"]),
        ("pretrain", ["data.blend=/path"], ["data.blend=/path: must be a list, like 'data.blend=[{path: /path}]'"]),
        ("pretrain", ["data.blend=[/path]"], ["data.blend=[/path]: must be a list, like 'data.blend=[{path: /path}]'"]),
        ("pretrain", ["data.blend=[{pth: a}]"], ["no such option as pth; did you mean path?"]),
        ("pretrain", ["data.blend=[{path: a, weight: x}]"], ["data.blend[0].weight=x: must be a number"]),
        ("pretrain", ["data.blend=[{weight: 1}]"], ["missing data.blend[0].path", "'data.blend=[{path: data/mine}]'"]),
        ("pretrain", ["run.name=[a]"], ["run.name=[a]: must be text, like 'run.name=\"[a]\"'"]),
        ("pretrain", ["run.dir=a(b)"], ["as text it is given in quotes, like 'run.dir=\"a(b)\"'"]),
        ("pretrain", ["run.dir=k=1,seed=2"], ["like 'run.dir=\"k=1,seed=2\"'"]),
        ("pretrain", ["run.dir=a,b"], ["like 'run.dir=\"a,b\"'", "--multirun"]),
        ("pretrain", ["run.name=${foo}"], ["run.name", "'foo'"]),
        ("pretrain", ["run.name=${oc.env:NO_SUCH_NAME}"], ["run.name", "NO_SUCH_NAME"]),
        ("pretrain", ["foo"], ["foo: options are given as NAME=VALUE"]),
        ("pretrain", ["mod el=3"], ["mod el=3: no such option"]),
        ("pretrain", ["=3"], ["=3: this command has no such option"]),
        ("pretrain", ["--hepl"], ["unrecognized arguments: --hepl"]),
        ("pretrain", ["--config-name", "nope"], ["Cannot find primary config 'nope'"]),
        ("pretrain", ["--config-dir", "/nope"], ["--config-dir /nope: no such folder"]),
        ("pretrain", ["--resolve"], ["--resolve: goes with --cfg only"]),
        ("pretrain", ["--shell-completion"], ["--shell-completion", "install=bash"]),
        ("pretrain", ["--cfg", "job", "run.naem=a"], ["did you mean run.name?"]),
        ("pretrain", ["--info", "config", "run.naem=a"], ["did you mean run.name?"]),
        ("slurm", ["--dry-run", "launch.node=3"], ["did you mean launch.nodes?"]),
        ("pretrain", ["--multirun", "run.sed=1,2"], ["run.sed=1,2: no such option; did you mean run.seed?"]),
        ("pretrain", ["--multirun", "run.seed=1,x"], ["run.seed=1,x: must be a whole number"]),
        ("pretrain", ["--multirun", "model=mone_tiny,mone_tin"], ["model=mone_tin: no such choice"]),
        ("pretrain", ["--multirun", "run.dir=a(b)"], ["like 'run.dir=\"a(b)\"'"]),
        ("pretrain", ["--multirun", "run.seed=interval(1,2)"], ["INTERVAL_SWEEP"]),
        ("pretrain", ["--help", "modle"], ["--help modle: no such section", "did you mean model?", "optimizer"]),
        ("sample", ["prompt=hello"], ["prompt=hello: no such option; did you mean prompts?"]),
        ("sample", ["prompts=hello"], ["prompts=hello: must be a list, like 'prompts=[\"hello\"]'"]),
        ("sample", ["prompts=[Who (or what)?]"], ["like 'prompts=[\"Who (or what)?\"]'"]),
        ("sample", ["run=runs/sweep/k=0.5,seed=1"], ["like 'run=\"runs/sweep/k=0.5,seed=1\"'"]),
        ("sample", ["run=\udcff"], ["run=\\udcff", "not UTF-8"]),
        ("pretrain", ["optimizer.lr=inf"], ["optimizer.lr=inf: must be a finite number"]),
        ("pretrain", ["run.timeout_minutes=inf"], ["run.timeout_minutes=inf: must be a finite number"]),
        ("pretrain", ["deepspeed.options={a: {b: nan}}"], ["deepspeed.options.a.b=nan: must be a finite number"]),
        ("tokenize", ["output=x", "tokenizer=y", "progress_seconds=nan"], ["progress_seconds=nan: must be a finite"]),
        ("plan", ["model=mone_2p8b", "tokens=-1"], ["tokens=-1.0: must be null or positive"]),
        ("sample", ["run=x", "temperature=-1"], ["temperature=-1.0: must be 0, or from 1e-6 to 1e6"]),
        ("sample", ["run=x", "temperature=nan"], ["temperature=nan: must be"]),
        ("sample", ["run=x", "temperature=inf"], ["temperature=inf: must be 0, or from 1e-6 to 1e6"]),
        ("sample", ["run=x", "temperature=1e-40"], ["temperature=1e-40: must be 0, or from 1e-6 to 1e6"]),
        ("sample", ["run=x", "temperature=1e300"], ["temperature=1e+300: must be 0, or from 1e-6 to 1e6"]),
        ("sample", ["run=x", "top_k=-1"], ["top_k=-1: must be at least 1, or 0 for all"]),
        ("sample", ["run=x", "max_new_tokens=-1"], ["max_new_tokens=-1: must be at least 1"]),
        ("sample", ["run=x", "seed=-1"], ["seed=-1: must be at least 0"]),
        ("sample", ["run=x", "prompts=[]"], ["prompts=[]: must be a list of texts, none of them empty"]),
        ("sample", ["run=x", "prompts=[a,'']"], ["prompts=['a', '']: must be", "none of them empty"]),
        ("sample", ["run=x", "prompts=[\udce9t\udce9]"], ["prompts=[\\udce9t\\udce9]", "not UTF-8"]),
        ("calibrate", ["run=nowhere", "data=[data/mine]"], ["nowhere"]),
        ("calibrate", ["run=nowhere", "data=data/mine"], ["data=data/mine: must be a list"]),
        *(
            (one, ["--multirun", "run=a,b"], ["--multirun: sweeps are started by `mone-pretrain"])
            for one in ("sample", "calibrate")
        ),
        ("sample", ["--multirun", "run=a,b", "hydra/launcher=local"], ["--multirun: sweeps are started by `mone-pretrain"]),
        ("verify", ["--multirun", "path=a,b"], ["--multirun: sweeps are started by `mone-pretrain"]),
        ("pretrain", ["--multirun", "run.seed=1,2", "hydra/launcher=basic"], ["with hydra/launcher=local or slurm"]),
        (
            "pretrain",
            ["--multirun", "model.activation_ratio=glob(*)"],
            ["model.activation_ratio=glob(*): glob() chooses among"],
        ),
        ("pretrain", ["--multirun", "model=glob(nothing*)"], ["model=glob(nothing*): none of mone_2p8b"]),
        ("pretrain", ["--multirun", 'hydra.sweeper.params={run.seed: "1,x"}'], ["run.seed=1,x: must be a whole number"]),
        ("pretrain", ["run.naem=a\x1b[31m\nb"], ["run.naem=a\\x1b[31m\\nb: no such option; did you mean run.name?"]),
        ("pretrain", ["--package", "x", "--cfg", "job"], ["--package x: no such section"]),
        ("pretrain", ["hydra.mode=MULTIRUN"], ["hydra.mode=MULTIRUN: --multirun on the command line starts a sweep"]),
        *(
            ("pretrain", ["--multirun", swept], [f"{swept}: a sweep cannot vary {swept.partition('=')[0]},"])
            for swept in ("run.name=a,b", "run.dir=a,b", "hydra.launcher.jobs=1,2", "hydra/launcher=local,slurm")
        ),
        ("pretrain", ["--multirun", "hydra.sweeper.params={run.name: 'a,b'}"], ["a sweep cannot vary run.name"]),
        ("status", ["--wrong"], ["error: the following arguments are required: RUN; see --help"]),
        ("status", ["a", "--wrong"], ["error: unrecognized arguments: --wrong; see --help"]),
        ("report", ["a", "--wandb", "on\nline"], ["--wandb: invalid choice: 'on\\nline'"]),
        ("import", [], ["missing source: give it on the command line, like source=models/qwen"]),
        ("import", ["source=nowhere"], ["source=nowhere: no such folder"]),
        ("import", ["source=x", "output=qwen.yaml"], ["output=qwen.yaml: must be FOLDER/model/NAME.yaml"]),
        ("pretrain", ["init.upcycle=true"], ["init.upcycle=True: needs init.source"]),
        ("pretrain", ["init.change=[hidden_size]"], ["init.change=['hidden_size']: choose from rotary_base"]),
        ("calibrate", ["run=x", "sequences=-4"], ["sequences=-4: must be at least 2"]),
        ("calibrate", ["run=x", "ratio=nan"], ["ratio=nan: must be in (0, 1]"]),
    ],
)
def test_errors_are_printed_on_one_line(
    call_main: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call_main((COMMANDS | WITH_FLAGS)[command], *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    for advice in ("Traceback", "HYDRA_FULL_ERROR", "use +", "full_key"):
        assert advice not in err


def test_an_error_in_a_users_file_names_the_file(call_main: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    for name, text, words in [
        ("typo", "# @package _global_\nmodel: {activation_ration: 0.5}\n", ["experiment/typo", "activation_ration"]),
        ("type", "# @package _global_\ntraining: {steps: many}\n", ["experiment/type", "training.steps", "many"]),
        ("yaml", "# @package _global_\nmodel: {activation: [\n", ["yaml.yaml", "line 3"]),
        ("file", "# @package _global_\ndefaults: [nothing]\n", ["experiment/nothing"]),
        ("text", "# @package _global_\nrun: {name: 2024_10_01}\n", ["experiment/text.yaml: run.name is read as 20241001"]),
        ("time", "# @package _global_\nrun: {time_limit: 24:00:00}\n", ["experiment/time.yaml: run.time_limit is read as"]),
        ("path", "# @package data\nblend: [{path: 1e3, weight: 2}]\n", ["experiment/path.yaml: data.blend[0].path is read"]),
        ("swept", "# @package _global_\nhydra: {sweeper: {params: {run.sed: '1,2'}}}\n", ["did you mean run.seed?"]),
    ]:
        (folder / f"{name}.yaml").write_text(text)
        how = ["--multirun"] if name == "swept" else []
        code, _, err = call_main(pretrain.main, *how, "--config-dir", str(tmp_path), f"experiment={name}")
        assert (code, err.count("\n")) == (2, 1), err
        for word in words:
            assert word in err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "pretrain",
            {"run.name": "2024_10_01", "run.dir": "1e3", "engine": "0x10", "resume": "NULL"},
        ),
        (
            "pretrain",
            {"run.name": "0123", "run.dir": " 1 ", "logging.wandb_group": "1_0", "resume": "nan"},
        ),
        ("pretrain", {"run.name": "true", "run.dir": ".5", "logging.wandb_group": "False", "logging.wandb_entity": "inf"}),
        ("tokenize", {"corpus.path": "2024_10_01", "corpus.revision": "12e4567", "corpus.name": "007", "output": "1.50"}),
        ("verify", {"path": "1_0"}),
        ("sample", {"run": "1e3", "thresholds": "1e3"}),
        ("slurm", {"launch.account": "1_2", "launch.environment.LEVEL": "1e3", "launch.environment.NOTHING": "null"}),
    ],
)
def test_text_stays_as_it_was_typed(call_main: Callable[..., Any], command: str, options: dict[str, str]) -> None:
    code, out, err = call_main(COMMANDS[command], *(f"{name}={value}" for name, value in options.items()), "--cfg", "job")
    assert (code, err) == (0, "")
    assert {name: OmegaConf.select(OmegaConf.create(out), name) for name in options} == options


@pytest.mark.parametrize(
    ("command", "option", "typed", "read"),
    [
        ("sample", "prompts", "[1e3, true, null, 2024_10_01, a b]", ["1e3", "true", "null", "2024_10_01", "a b"]),
        ("sample", "prompts", "['1,5', \"1e3\"]", ["1,5", "1e3"]),
        ("tokenize", "corpus.path", "[1e3,2_0]", ["1e3", "2_0"]),
        ("slurm", "launch.environment", "{A: 1e3, B: no, C: 0x10}", {"A": "1e3", "B": "no", "C": "0x10"}),
        ("slurm", "launch.modules", "[gcc/12, 12.10]", ["gcc/12", "12.10"]),
        ("pretrain", "data.blend", "[{path: 1e3, weight: 1e1}]", [{"path": "1e3", "weight": 10.0}]),
        ("pretrain", "run.time_limit", "null", None),
        ("pretrain", "deepspeed.options", "{a: {b: 1e3}, c: true}", {"a": {"b": 1000.0}, "c": True}),
        ("pretrain", "training.steps", "1_000", 1000),
    ],
)
def test_values_within_lists_and_mappings(
    call_main: Callable[..., Any], command: str, option: str, typed: str, read: Any
) -> None:
    code, out, err = call_main(COMMANDS[command], f"{option}={typed}", "--cfg", "job")
    assert (code, err) == (0, "")
    found = OmegaConf.select(OmegaConf.create(out), option)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == read


def test_overrides_may_stand_before_and_behind_flags(call_main: Callable[..., Any]) -> None:
    code, out, _ = call_main(pretrain.main, "run.seed=3", "--cfg", "job", "run.name=mine")
    assert code == 0
    config = OmegaConf.create(out)
    assert (config.run.seed, config.run.name) == (3, "mine")


@pytest.mark.parametrize(
    ("command", "first"), [("pretrain", "engine="), ("slurm", "launch.nodes="), ("plan", "cluster.gpu=")]
)
def test_help_is_short_and_begins_with_the_commands_own_options(
    call_main: Callable[..., Any], command: str, first: str
) -> None:
    code, out, _ = call_main(COMMANDS[command], "--help")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert len(lines) < 110
    assert lines[lines.index("Options:") + 1].startswith(first)
    assert "activation_ratio" in out
    code, model, _ = call_main(COMMANDS[command], "--help", "model")
    assert code == 0
    assert "model.activation_ratio=" in model
    assert "optimizer.lr" not in model
    code, everything, _ = call_main(COMMANDS[command], "--help", "all")
    assert code == 0
    assert model in everything
    assert "guard.window=" in everything


def test_help_of_a_launcher_is_of_the_one_chosen(call_main: Callable[..., Any]) -> None:
    assert "hydra.launcher.jobs=" in call_main(pretrain.main, "--help", "hydra.launcher")[1]
    assert "hydra.launcher.nodes=" in call_main(pretrain.main, "--help", "hydra.launcher", "hydra/launcher=slurm")[1]


def test_a_reader_that_ends_early_is_not_an_error() -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "data_prep.verify", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None
    command.stdout.close()
    assert command.stderr is not None
    assert command.stderr.read() == b""
    assert command.wait() == 0


def test_full_error_prints_the_traceback(call_main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, _, err = call_main(plan.main, "tokens=many")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: tokens=many")


def test_text_stays_as_it_was_typed_in_the_points_of_a_sweep(call_main: Callable[..., Any], tmp_path: Path) -> None:
    data = make_shards(tmp_path / "shards")
    (tmp_path / "experiment").mkdir()
    swept = "# @package _global_\nhydra: {sweeper: {params: {logging.wandb_entity: '1e3,true'}}}\n"
    (tmp_path / "experiment/swept.yaml").write_text(swept)
    options = ["hydra/launcher=slurm", "hydra.launcher.dry_run=true", "hydra.launcher.gpus_per_node=1"]
    options += [f"run.dir={tmp_path}/runs", f"data.blend=[{{path: {data}}}]", "model.seq_length=32"]
    code, out, err = call_main(
        *(pretrain.main, "--multirun", "--config-dir", str(tmp_path), "experiment=swept", *options),
        "logging.wandb_group=2024_10_01,1e3",
    )
    assert (code, err) == (0, "")
    names = [line.partition("--job-name=")[2] for line in out.splitlines() if "--job-name=" in line]
    points = [f"wandb_entity={entity},wandb_group={group}" for entity in ("1e3", "true") for group in ("2024_10_01", "1e3")]
    assert names == [f"runs/{point}" for point in points]


@pytest.mark.parametrize(
    ("sweep", "points"),
    [
        ("model=glob(mone_t*)", ["model=mone_tiny"]),
        ('hydra.sweeper.params={run.seed: "1,2"}', ["seed=1", "seed=2"]),
        ('hydra.sweeper.params={model: "glob(mone_*b)"}', ["model=mone_2p8b"]),
    ],
)
def test_sweep_syntax(
    call_main: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: str, points: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call_main(pretrain.main, "--multirun", sweep)  # refused, since data is missing
    assert (code, out) == (2, "")
    assert [line.strip().partition(": ")[0] for line in err.splitlines()[1:]] == points


def test_data_has_no_default(call_main: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command, *options in (["pretrain"], ["pretrain", "model=mone_2p8b"], ["slurm", "--dry-run"]):
        code, _, err = call_main(COMMANDS[command], *options)
        assert code == 2
        assert err.startswith("error: data.blend=[]: there is no data to read")
        assert "'data.blend=[{path: data/mine}]', or data=demo" in err
    code, out, _ = call_main(plan.main, "model=mone_925m", "compute.precision=bf16", "training.global_batch_size=64")
    assert code == 0
    assert "924.1M" in out
    assert "data/demo/shards/bible" in call_main(pretrain.main, "experiment=k_sweep", "--cfg", "job")[1]


def test_the_job_in_docs_can_be_submitted_with_data(call_main: Callable[..., Any], tmp_path: Path) -> None:
    page = (ROOT / "docs/slurm.md").read_text().replace("\\\n", "")
    (arguments,) = re.findall(r"^mone-slurm (.* --dry-run)$", page, re.MULTILINE)
    data = make_shards(tmp_path / "shards", documents=1000)
    assert "data=demo" in arguments
    arguments = arguments.replace("data=demo", f"'data.blend=[{{path: {data}}}]' run.dir={tmp_path}/run")
    code, out, err = call_main(slurm.main, *shlex.split(arguments))
    assert (code, err) == (0, "")
    assert "#SBATCH --nodes=8" in out


def test_commands_in_the_documentation_compose(
    call_main: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text().replace("\\\n", ""), re.MULTILINE | re.DOTALL):
            lines += [line.strip() for line in block.splitlines() if line.strip().startswith("mone-")]
    for written in re.findall(r"output=(imported/\S+)", "\n".join(lines)):  # by mone-import
        (tmp_path / written).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / written).write_text("num_layers: 2\n")
    composed = 0
    for line in lines:
        command, *arguments = shlex.split(line, comments=True)
        main = COMMANDS.get(command.removeprefix("mone-"))
        if main is None or {"--help", "--multirun"} & set(arguments):
            continue
        code, _, err = call_main(main, *(one for one in arguments if one not in ("--dry-run", "...")), "--cfg", "job")
        assert code == 0, f"{line}: {err}"
        composed += 1
    assert composed >= 10


def test_groups_of_a_search_path_in_a_configuration_file_are_known(tmp_path: Path, call_main: Callable[..., Any]) -> None:
    (tmp_path / "more/experiment/sub").mkdir(parents=True)
    (tmp_path / "more/experiment/sub/mine.yaml").write_text("# @package _global_\ntraining:\n  steps: 17\n")
    path = f"hydra:\n  searchpath:\n    - file://{tmp_path}/more\n"
    (tmp_path / "mine.yaml").write_text(f"defaults:\n  - pretrain\n  - _self_\n{path}")
    arguments = ("--config-dir", str(tmp_path), "--config-name", "mine", "experiment=sub/mine", "--cfg", "job")
    code, out, errors = call_main(pretrain.main, *arguments)
    assert code == 0, errors
    assert "steps: 17" in out
