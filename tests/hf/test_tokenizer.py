"""A converted tokenizer encodes every text as the tokenizer of the run does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from data_prep import tokenizer_training
from data_prep.tokenizer import load_tokenizer
from mone_common.console import UserError
from mone_model.hf import export, load
from mone_model.hf.tokenizer import write_tokenizer
from tests.conftest import ROOT
from tests.hf.checkpoints import build, model_of, save

Call = Callable[..., tuple[int, str, str]]
WORDS = st.sampled_from(
    [" ", "  ", " the", "\n", "\t", "<s>", "</s>", "<unk>", "<0x0A>", "\u2581", "\u2585", "\0", "tion", "12"]
)
TEXTS = st.lists(st.one_of(st.text(max_size=5), WORDS, st.text("aeth \n", max_size=8)), max_size=20).map("".join)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of mone-train-tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = (ROOT / "LICENSE").read_text() + "äöü ñ 日本語 \U0001f600"  # a text that does not change
    (folder / "text.jsonl").write_text(json.dumps({"text": text}))
    config = tokenizer_training.TrainTokenizerConfig(output=str(folder / "tokenizer"), vocab_size=800)
    config.corpus.path = str(folder / "text.jsonl")
    tokenizer_training.train_tokenizer(config)
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def converted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The sentencepiece model and the converted tokenizer."""
    folder = tmp_path_factory.mktemp("converted")
    write_tokenizer(trained, folder, context=64)
    return SentencePieceProcessor(model_file=str(trained / "tokenizer.model")), AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_every_text_is_encoded_and_decoded_equally(converted: tuple[Any, Any], text: str) -> None:
    ours, theirs = converted
    tokens = ours.encode(text)
    assert theirs(text)["input_ids"] == tokens
    assert theirs.decode(tokens, skip_special_tokens=True) == ours.decode(tokens)


def test_documents_are_encoded_equally(converted: tuple[Any, Any]) -> None:
    ours, theirs = converted
    for path in sorted((ROOT / "mone_model").rglob("*.py")):
        assert theirs(path.read_text())["input_ids"] == ours.encode(path.read_text()), path


def test_special_tokens_and_padding(converted: tuple[Any, Any]) -> None:
    ours, theirs = converted
    assert theirs.eos_token_id == ours.eos_id()
    batch = theirs(["a", "the city of"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert theirs.decode([*ours.encode("the city"), ours.eos_id()], skip_special_tokens=True) == "the city"


@pytest.mark.usefixtures("one_process")
def test_an_exported_folder_has_the_tokenizer(trained: Path, tmp_path: Path, call_main: Call) -> None:
    model = model_of(vocab_size=800)
    save(tmp_path / "run", build(model), model)
    shutil.copytree(trained, tmp_path / "run/tokenizer")
    assert call_main(export.main, f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}")[0] == 0
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(trained)
    assert tokenizer(" Ask\n")["input_ids"] == ours.encode([" Ask\n"])[0]
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == ours.eod_id
    loaded, again = load(tmp_path / "run")
    assert again("the city")["input_ids"] == tokenizer("the city")["input_ids"]
    assert loaded.config.eos_token_id == ours.eod_id
    # The folder of an exported Hugging Face tokenizer is the tokenizer of a later run.
    assert load_tokenizer(tmp_path / "out").encode([" Ask\n"]) == ours.encode([" Ask\n"])


@pytest.mark.usefixtures("one_process")
def test_a_tokenizer_that_does_not_fit_is_refused(trained: Path, tmp_path: Path, call_main: Call) -> None:
    model = model_of(vocab_size=700)
    save(tmp_path / "run", build(model), model)
    shutil.copytree(trained, tmp_path / "run/tokenizer")
    code, _, errors = call_main(export.main, f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}")
    assert code == 2
    assert "has 800 tokens; the model has model.vocab_size=700" in errors
    assert not (tmp_path / "out").exists()
    for content, message in ((b"", "not a sentencepiece model"), (None, "holds neither tokenizer.model nor")):
        (tmp_path / "run/tokenizer/tokenizer.model").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "run/tokenizer/tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=message):
            write_tokenizer(tmp_path / "run/tokenizer", tmp_path, context=64)
