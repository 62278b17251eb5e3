"""Commands: help, errors in options, and a run that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep import package_texts, tokenize, tokenizer_training, verify
from data_prep.shards import load_manifest
from tests.data_prep.conftest import contents, made_up_documents, write_jsonl

COMMANDS: list[tuple[Callable[[], None], type[Any]]] = [
    (tokenizer_training.main, tokenizer_training.TrainTokenizerConfig),
    (tokenize.main, tokenize.TokenizeConfig),
    (verify.main, verify.VerifyConfig),
    (package_texts.main, package_texts.PackageTextsConfig),
]


def option_names(kind: type[Any], prefix: str = "") -> list[str]:
    """Every option of a configuration class as the user types it."""
    names = []
    for field in fields(kind):
        nested = is_dataclass(field.type)
        names += option_names(field.type, f"{prefix}{field.name}.") if nested else [prefix + field.name]  # type: ignore[arg-type]
    return names


@pytest.mark.parametrize(("main", "kind"), COMMANDS)
def test_help_explains_every_option(call_main: Callable[..., Any], main: Callable[[], None], kind: type[Any]) -> None:
    code, out, _ = call_main(main, "--help")
    assert not code
    lines = out.splitlines()
    for name in option_names(kind):
        (at,) = [n for n, line in enumerate(lines) if line.startswith((f"  {name}=", f"  {name}  (required)"))]
        assert len(lines[at + 1].split()) > 2
    assert "Example:" in out


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (
            tokenize.main,
            [],
            "error: missing output, tokenizer: give it on the command line, like output=data/",
        ),
        (tokenizer_training.main, ["corpus.path=x"], "error: missing output: give it on the command line"),
        (
            verify.main,
            [],
            "error: missing path: give it on the command line, like path=data/demo/shards/wikipedia",
        ),
        (tokenize.main, ["output=x", "tokenizer=y", "workers=0"], "error: workers=0: must be at least 1"),
        (tokenize.main, ["output=x", "tokenizer=y"], "error: give the corpus as 'corpus.path="),
        (
            tokenize.main,
            ["output=x", "tokenizer=y", "corpus.path=a/*.txt"],
            "error: corpus.path=a/*.txt: no such",
        ),
        (
            tokenize.main,
            ["output=x", "tokenizer=y", "corpus.path=[a.txt,b]"],
            "error: corpus.path=a.txt: no such",
        ),
    ],
)
def test_errors_are_printed_without_a_traceback(
    call_main: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[], None],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call_main(main, *arguments)
    assert code == 2
    assert err.startswith(message)
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())  # no outputs/ of hydra's either


def test_an_unknown_option_is_named(call_main: Callable[..., Any]) -> None:
    code, _, err = call_main(tokenize.main, "output=x", "tokenizer=y", "corpus.text_fild=z")
    assert code == 2
    assert err == "error: corpus.text_fild=z: no such option; did you mean corpus.text_field?\n"


def test_a_killed_run_continues_to_the_same_bytes(
    tmp_path: Path, tokenizer_folder: Path, call_main: Callable[..., Any]
) -> None:
    """kill -9 of the real command after a few recorded groups; its workers exit as well."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", made_up_documents(20_000))
    arguments = [f"corpus.path={corpus}", f"tokenizer={tokenizer_folder}", "shard_tokens=10000", "workers=2"]
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    run = [sys.executable, "-m", "data_prep.tokenize", f"output={killed}", *arguments]
    process = subprocess.Popen(run, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and groups_on_record(killed) < 5:
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert not (killed / "manifest.json").exists()
    for folder in (killed, undisturbed):
        code, out, _ = call_main(tokenize.main, f"output={folder}", *arguments)
        assert code == 0
        assert f"{folder}: train " in out
    assert contents(killed) == contents(undisturbed)
    assert list(verify.damages(load_manifest(killed))) == []


def groups_on_record(folder: Path) -> int:
    """Finished groups of a running tokenization."""
    try:
        return json.loads((folder / "progress.json").read_text())["groups"]
    except FileNotFoundError:
        return 0
