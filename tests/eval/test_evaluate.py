"""`mone-evaluate` on text, against plain forward passes of transformers."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from mone_eval import evaluate
from mone_eval.text import beginning_of
from mone_model.hf import export
from mone_model.hf.tokenizer import write_tokenizer
from tests.conftest import ROOT
from tests.eval.models import make_run, write_llama, write_mixtral
from tests.hf.test_tokenizer import trained as trained

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), trained)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of 3 to 300 tokens."""
    paragraphs = [each for each in (ROOT / "LICENSE").read_text().split("\n\n") if each.strip()][:24]
    path = tmp_path_factory.mktemp("text") / "licence.jsonl"
    path.write_text("\n".join(json.dumps({"text": each}) for each in [*paragraphs, "ä"]))
    return path


def result_of(call_main: Call, output: Path, *arguments: str) -> dict[str, Any]:
    code, printed, errors = call_main(evaluate.main, f"output={output}", *arguments)
    assert code == 0, errors
    assert f"written: {output}" in printed
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_scores_equal_plain_forward_passes(llama: Path, text: Path, tmp_path: Path, call_main: Call) -> None:
    more = ["window=64", "stride=20", "max_documents=9", "progress_seconds=0"]
    found = result_of(call_main, tmp_path / "a.json", f"model={llama}", f"text={text}", *more)["text"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    total = tokens = size = 0.0
    for line, document in zip(text.read_text().splitlines(), found["documents"], strict=False):
        content = json.loads(line)["text"]
        ids = [tokenizer.eos_token_id, *tokenizer(content, add_special_tokens=False)["input_ids"]]
        nll = 0.0
        for target in range(1, len(ids)):
            # The first window predicts 64 tokens; each other one 20, after 45 tokens of context or more.
            start = 0 if target <= 64 else 20 * math.ceil((target - 64) / 20)
            with torch.no_grad():
                logits_V = model(torch.tensor([ids[start:target]])).logits[0, -1]
            nll -= float(logits_V.log_softmax(-1)[ids[target]])
        assert document["nll"] == pytest.approx(nll, rel=1e-5)
        assert document["tokens"] == len(ids) - 1
        assert document["bytes"] == len(content.encode())
        total, tokens, size = total + nll, tokens + len(ids) - 1, size + len(content.encode())
    assert found["nll_per_token"]["value"] == pytest.approx(total / tokens, rel=1e-6)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["bits_per_byte"]["value"] == pytest.approx(total / size / math.log(2), rel=1e-6)
    assert found["bits_per_byte"]["low"] < found["bits_per_byte"]["value"] < found["bits_per_byte"]["high"]


def test_a_text_in_one_window_equals_the_loss_of_transformers(
    llama: Path, text: Path, tmp_path: Path, call_main: Call
) -> None:
    more = ["begin=none", "max_documents=2"]
    found = result_of(call_main, tmp_path / "a.json", f"model={llama}", f"text={text}", *more)["text"]["documents"][0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    ids = tokenizer(json.loads(text.read_text().splitlines()[0])["text"], return_tensors="pt")["input_ids"]
    assert found["tokens"] == ids.size(1) - 1
    assert found["nll"] / found["tokens"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_a_document_begins_as_the_tokenizer_begins_a_text(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert beginning_of(tokenizer) == tokenizer.eos_token_id
    adds = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert beginning_of(tokenizer) == tokenizer.bos_token_id


def test_a_loss_that_is_not_finite_is_reported(
    llama: Path, text: Path, trained: Path, tmp_path: Path, call_main: Call
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.lm_head.weight.data[5] = math.nan
    model.save_pretrained(tmp_path / "damaged")
    write_tokenizer(trained, tmp_path / "damaged", context=64)
    code, _, errors = call_main(evaluate.main, f"model={tmp_path / 'damaged'}", f"text={text}", "output=none.json")
    assert code == 2
    assert f"text: the loss of {text}:" in errors
    assert "is not finite" in errors


@pytest.mark.parametrize("kind", ["llama", "mixtral", "run"])
def test_the_batch_size_changes_nothing(
    kind: str, llama: Path, text: Path, trained: Path, tmp_path: Path, call_main: Call, request: pytest.FixtureRequest
) -> None:
    if kind == "run":
        request.getfixturevalue("one_process")
        folder = make_run(tmp_path / "run", trained)
    else:
        folder = llama if kind == "llama" else write_mixtral(tmp_path / "mixtral", trained)
    first, *others = (
        result_of(call_main, tmp_path / f"{size}.json", f"model={folder}", f"text={text}", f"batch_size={size}", "window=48")
        for size in (1, 3, 100)
    )
    for other in others:
        for one, two in zip(first["text"]["documents"], other["text"]["documents"], strict=True):
            assert two["nll"] == pytest.approx(one["nll"], rel=1e-5)
        assert other["model"]["fingerprint"] == first["model"]["fingerprint"]


@pytest.mark.usefixtures("one_process")
def test_a_run_at_another_sparsity(text: Path, trained: Path, tmp_path: Path, call_main: Call) -> None:
    run = make_run(tmp_path / "run", trained, activation_ratio=0.5)
    few = [f"text={text}", "max_documents=6"]
    as_trained, half, quarter = (
        result_of(call_main, tmp_path / f"{number}.json", f"model={run}", *few, *more)
        for number, more in enumerate(([], ["ratio=0.5"], ["ratio=0.25"]))
    )
    assert half["text"]["documents"] == as_trained["text"]["documents"]
    assert quarter["text"]["nll_per_token"] != half["text"]["nll_per_token"]
    assert (half["model"]["activation_ratio"], quarter["model"]["activation_ratio"]) == (0.5, 0.25)
    (run / "thresholds.json").write_text(json.dumps({"thresholds": [0.0, 0.0]}))
    kept = result_of(call_main, tmp_path / "t.json", f"model={run}", *few, "select=threshold")
    whole = result_of(call_main, tmp_path / "w.json", f"model={run}", *few, "ratio=1")
    assert kept["text"]["nll_per_token"]["value"] == pytest.approx(whole["text"]["nll_per_token"]["value"], rel=1e-5)
    assert "checkpoints" in kept["model"]["source"]
    assert call_main(export.main, f"run={run}", f"output={tmp_path / 'exported'}")[0] == 0
    exported = result_of(call_main, tmp_path / "e.json", f"model={tmp_path / 'exported'}", *few)
    assert exported["model"]["fingerprint"] == as_trained["model"]["fingerprint"]
    assert exported["text"]["nll_per_token"] == as_trained["text"]["nll_per_token"]
    code, printed, errors = call_main(evaluate.main, f"model={run}", *few)
    assert code == 0, errors
    (written,) = (run / "evaluations").glob("*.json")
    assert f"written: {written}" in printed


def test_a_comparison_of_results_is_that_of_models(
    llama: Path, text: Path, trained: Path, tmp_path: Path, call_main: Call
) -> None:
    other = write_llama(tmp_path / "other", trained, seed=1)
    results = [
        result_of(call_main, tmp_path / f"{number}.json", f"model={folder}", f"text={text}")
        for number, folder in enumerate((llama, other))
    ]
    of_files, of_models = (
        result_of(call_main, tmp_path / f"{name}.json", compared, *more)["comparison"]
        for name, compared, more in (
            ("files", f"compare=[{tmp_path}/0.json,{tmp_path}/1.json]", []),
            ("models", f"compare=[{llama},{other}]", [f"text={text}"]),
        )
    )
    assert of_files["differences"] == of_models["differences"]
    for name, found in of_files["differences"].items():
        first, second = (result["text"][name]["value"] for result in results)
        assert found["value"] == pytest.approx(second - first)
        assert found["low"] < found["value"] < found["high"]
    fewer = result_of(call_main, tmp_path / "fewer.json", f"model={llama}", f"text={text}", "max_documents=3")
    assert fewer["text"]["num_documents"] == 3
    code, _, errors = call_main(evaluate.main, f"compare=[{tmp_path}/0.json,{tmp_path}/fewer.json]", "output=none.json")
    assert code == 2
    assert "evaluate both with the same text and limits" in errors


BAD = {
    "model=none": "model=none: no such folder",
    "model={tmp}": "model={tmp}: neither a run with checkpoints nor a checkpoint",
    "text=none.txt": "text=none.txt: no such file",
    "text={tmp}/empty.txt": "text={tmp}/empty.txt: has no text to score",
    "ratio=0": "ratio=0.0: must be above 0 and at most 1",
    "select=best": "select=best: choose exact or threshold",
    "select=threshold": "write one with mone-calibrate",
    "dtype=int8": "dtype=int8: choose one of auto",
    "device=tpu": "device=tpu: cannot be used here",
    "window=65": "window=65: the model has a context of 64 tokens",
    "stride=0": "stride=0: must be at least 1",
    "step=3": "is a Hugging Face model, which has no steps",
    "output={tmp}/empty.txt": "output={tmp}/empty.txt: exists; remove it",
    "compare=[a.json]": "name two results",
    "limit=-1": "limit=-1: must be at least 1",
}


@pytest.mark.parametrize("option", BAD)
def test_bad_options_are_one_line(llama: Path, text: Path, tmp_path: Path, call_main: Call, option: str) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    given, expected = (each.format(tmp=tmp_path) for each in (option, BAD[option]))
    arguments = {"model": str(llama), "text": str(text), "output": str(tmp_path / "out.json")}
    name, _, value = given.partition("=")
    arguments[name] = value
    code, output, errors = call_main(evaluate.main, *(f"{key}={each}" for key, each in arguments.items()))
    assert code == 2
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert expected in errors
    assert not (tmp_path / "out.json").exists()


def test_a_model_without_tokenizer_and_a_command_without_text(llama: Path, tmp_path: Path, call_main: Call) -> None:
    shutil.copytree(llama, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    for arguments, expected in (
        ([f"model={tmp_path / 'bare'}", "text=x.txt"], "has no tokenizer; copy the tokenizer of its data to"),
        ([f"model={llama}"], "nothing to score: give text=PATH"),
        (["text=x.txt"], "missing model"),
        ([f"model={llama}", "text=x.txt", "corpus.hub=y"], "not both"),
    ):
        code, _, errors = call_main(evaluate.main, *arguments)
        assert code == 2
        assert expected in errors
