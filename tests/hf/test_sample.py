"""`mone-sample`: continuations of prompts, batched, streamed, from a file and from the terminal."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mone_model.hf import export
from tests.hf.checkpoints import build, model_of, save
from tests.hf.test_tokenizer import trained as trained
from train import sample

pytestmark = pytest.mark.usefixtures("one_process")
Call = Callable[..., tuple[int, str, str]]
PROMPTS = ["The", "A step of the optimizer", "In", "Tokens that", "x"]


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a context of 64 tokens and a tokenizer."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    model = model_of(vocab_size=800, seq_length=64, activation_ratio=0.25)
    save(tmp_path / "run", build(model), model)
    shutil.copytree(trained, tmp_path / "run/tokenizer")
    return tmp_path / "run"


def continuations(output: str) -> dict[str, str]:
    """The continuation of each prompt."""
    return {prompt: output.split(f"{prompt} ...", 1)[1].split("\n\n")[0] for prompt in PROMPTS}


def test_batches_streams_and_files_give_the_same_text(run: Path, tmp_path: Path, call_main: Call) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    quoted = f"prompts={json.dumps(PROMPTS)}"
    results = []
    for arguments in (
        [quoted, "batch_size=1"],
        [quoted, "batch_size=4"],
        [f"file={tmp_path / 'prompts.txt'}"],
    ):
        code, output, errors = call_main(sample.main, f"run={run}", "temperature=0", "max_new_tokens=9", *arguments)
        assert code == 0, errors
        assert "tokens per second" in errors
        results.append(continuations(output))
    assert results[0] == results[1] == results[2]
    assert all(results[0].values())


def test_an_interactive_session_streams(run: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, expected, _ = call_main(sample.main, f"run={run}", "temperature=0", "max_new_tokens=9", 'prompts=["The", "In"]')
    assert code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\n\nIn\n"))
    code, output, errors = call_main(sample.main, f"run={run}", "temperature=0", "max_new_tokens=9", "interactive=true")
    assert code == 0, errors
    # A model with random weights writes bytes that are no characters; what they become depends on those that follow.
    assert re.findall(r"[a-zA-Z ]+", output) == re.findall(r"[a-zA-Z ]+", expected)


def test_the_seed_decides_and_the_options_change_the_text(run: Path, call_main: Call) -> None:
    def written(*arguments: str) -> str:
        code, output, errors = call_main(sample.main, f"run={run}", 'prompts=["The"]', "max_new_tokens=20", *arguments)
        assert code == 0, errors
        return output

    plain = written("seed=1")
    assert written("seed=1") == plain
    for option in ("seed=2", "temperature=0", "top_p=0.01", "top_k=1"):
        assert written("seed=1", option) != plain, option
    best = written("temperature=0")
    assert written("top_k=1") == written("top_p=0.000001") == best
    assert written("temperature=0", "repetition_penalty=50") != best  # a random model repeats itself


def test_a_long_prompt_keeps_its_last_tokens(run: Path, call_main: Call) -> None:
    def written(prompt: str, tokens: int) -> tuple[str, str]:
        code, output, errors = call_main(
            sample.main, f"run={run}", f"prompts={json.dumps([prompt])}", "temperature=0", f"max_new_tokens={tokens}"
        )
        assert code == 0, errors
        return output.split(" ...", 1)[1], errors

    long = "the optimizer " * 60
    assert written(long, 14)[0] == written("x " + long, 14)[0]
    text, errors = written("The", 500)
    assert "max_new_tokens=500: the model has a context of 64 tokens; continuations end after 63" in errors
    assert text


def test_thresholds_and_exported_folders(run: Path, tmp_path: Path, call_main: Call) -> None:
    part = {"layers": [0, 1], "ratios": {"0.5": [0.1, 0.1], "0.25": [0.3, 0.3]}}
    (tmp_path / "thresholds.json").write_text(json.dumps({"parts": {"routed": part}}))
    thresholds = [f"thresholds={tmp_path / 'thresholds.json'}", "ratio=0.25"]
    options = ["temperature=0", "max_new_tokens=9", f"prompts={json.dumps(PROMPTS)}"]
    best = call_main(sample.main, f"run={run}", *options)[1]
    code, by_threshold, errors = call_main(sample.main, f"run={run}", *thresholds, *options)
    assert code == 0, errors
    assert by_threshold != best
    assert call_main(sample.main, f"run={run}", "ratio=1", *options)[1] != best
    code, _, errors = call_main(sample.main, f"run={run}", thresholds[0], *options)
    assert (code, "has thresholds for the ratios 0.5, 0.25; choose one of them" in errors) == (2, True)
    for name, more, expected in (("best", [], best), ("thresholds", thresholds, by_threshold)):
        assert call_main(export.main, f"run={run}", f"output={tmp_path / name}", *more)[0] == 0
        assert call_main(sample.main, f"run={tmp_path / name}", *options)[1] == expected


def test_a_run_without_tokenizer_names_the_way_out(run: Path, call_main: Call) -> None:
    shutil.rmtree(run / "tokenizer")
    code, _, errors = call_main(sample.main, f"run={run}")
    assert code == 2
    assert f"has no tokenizer; copy the tokenizer of its data to {run}/tokenizer" in errors


BAD = {
    "top_p=0": "top_p=0.0: must be above 0 and at most 1",
    "repetition_penalty=-1": "repetition_penalty=-1.0: must be positive",
    "batch_size=0": "batch_size=0: must be at least 1",
    "file=none.txt": "file=none.txt: does not exist or has no line with a prompt",
    "thresholds=none.json": "thresholds=none.json: is missing",
    "ratio=2": "ratio=2.0: must be above 0 and at most 1",
    "run=none": "run=none: does not exist",
    "step=9": "has no checkpoint of step=9",
    'prompts=["a", ""]': "must be a list of texts, none of them empty",
}


@pytest.mark.parametrize("option", BAD)
def test_bad_options_are_one_line(run: Path, call_main: Call, option: str) -> None:
    code, output, errors = call_main(sample.main, *([] if option.startswith("run=") else [f"run={run}"]), option)
    assert code == 2
    assert output == ""
    assert errors.startswith("error: ")
    assert BAD[option] in errors
