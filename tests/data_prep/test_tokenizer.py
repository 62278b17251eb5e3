"""Reproducible training, lossless encoding, and tokenizers of Hugging Face."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpora import CorpusConfig
from data_prep.encoding import encode_batch
from data_prep.errors import DataError
from data_prep.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from data_prep.tokenizer_training import TrainTokenizerConfig, draw_sample, train_tokenizer
from tests.data_prep.conftest import made_up_documents, write_jsonl


def train(corpus_file: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Train on the made-up corpus."""
    return train_tokenizer(TrainTokenizerConfig(CorpusConfig(path=str(corpus_file)), str(output), **options))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_twice_gives_the_same_bytes(corpus_file: Path, tmp_path: Path, model_type: str) -> None:
    options: dict[str, Any] = {"vocab_size": 500, "model_type": model_type, "sample_bytes": 20_000}
    reports = [train(corpus_file, tmp_path / name, **options) for name in ("a", "b")]
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()
    assert reports[0] == reports[1]
    assert train(corpus_file, tmp_path / "c", **options, seed=1)["sha256"] != reports[0]["sha256"]


def test_the_settings_are_saved_with_the_model(corpus_file: Path, tmp_path: Path) -> None:
    report = train(corpus_file, tmp_path, vocab_size=400, sample_bytes=10_000)
    assert json.loads((tmp_path / "tokenizer_training.json").read_text()) == report
    assert report["settings"]["vocab_size"] == report["vocab_size"] == 400
    assert report["sha256"] == load_tokenizer(tmp_path).sha256
    assert 9_000 < report["sample"]["bytes"] <= 10_000


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "reserved", ["\0", "\u2585", "\t", "\x1f", "\u2581", "\ufffd", "<unk>", "<s>", "<0x0A>", "x" * 20_000]
)
def test_lines_of_any_content_are_used(
    documents: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str, reserved: str
) -> None:
    texts = [*documents, *(f"{number}ж{reserved}" for number in range(9))]
    report = train(
        write_jsonl(tmp_path / "a.jsonl", texts), tmp_path, vocab_size=400, character_coverage=1, model_type=model_type
    )
    (ids,) = load_tokenizer(tmp_path).encode(["ж"])
    assert len(ids) <= 2  # were it unknown, two bytes behind a space
    left_out = 9 if reserved in ("\0", "\u2585") else 0
    assert report["sample"]["documents_with_reserved_characters"] == left_out
    assert ("left out of 9 documents" in caplog.text) == bool(left_out)


def test_documents_longer_than_the_sample_are_counted(
    documents: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    corpus = write_jsonl(tmp_path / "a.jsonl", [*documents, "long " * 10_000, "longer " * 10_000])
    report = train(corpus, tmp_path, vocab_size=400, sample_bytes=30_000)
    assert report["sample"]["documents_longer_than_sample"] == 2
    assert caplog.messages[0].startswith("a: 1 file (1 jsonl), ")
    assert "a: 2 documents left out, longer than sample_bytes=30000" in caplog.messages


@given(st.integers(1, 3000), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_a_sample_is_bounded_and_does_not_depend_on_order(size: int, random: Any) -> None:
    texts = made_up_documents(30) * 2
    sample = draw_sample(texts, size, seed=3)
    assert sum(len(text.encode()) for text in sample) <= size
    assert len(set(sample)) == len(sample)
    random.shuffle(texts)
    assert draw_sample(texts, size, seed=3) == sample


def test_a_sample_is_spread_over_the_corpus() -> None:
    texts = made_up_documents(3000)
    numbers = sorted(int(text.split(".")[0].split()[1]) for text in draw_sample(texts, 100_000, seed=0))
    assert 300 < len(numbers) < 1000
    tenths = [sum(number // 300 == tenth for number in numbers) for tenth in range(10)]
    assert min(tenths) > len(numbers) / 20


def test_a_vocabulary_too_large_for_the_corpus(corpus_file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"vocab_size=50000: too large for this corpus; the maximum .* is \d+\.",
    ):
        train(corpus_file, tmp_path, vocab_size=50_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "vocab_size=100, model_type=bpe: sentencepiece failed: .*smaller than required"),
        ({"model_type": "words"}, "model_type=words: must be bpe or unigram"),
        ({"sample_bytes": 5}, "no document to train on.*sample_bytes=5"),
    ],
)
def test_invalid_training_options(corpus_file: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(corpus_file, tmp_path, **options)


@pytest.fixture(scope="module")
def hugging_face_folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer as Hugging Face stores it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    model = ByteLevelBPETokenizer()
    model.train_from_iterator(documents, vocab_size=500, special_tokens=["<|end|>"], show_progress=False)
    folder = tmp_path_factory.mktemp("hugging_face")
    PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


def test_code_in_a_tokenizer_folder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('was run')\n")
    config = {"auto_map": {"AutoTokenizer": ["code.Odd", None]}, "tokenizer_class": "Odd"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(DataError, match="not a Hugging Face tokenizer folder"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module", params=["sentencepiece", "hugging_face"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Path, hugging_face_folder: Path) -> Tokenizer:
    """One tokenizer of either kind."""
    return load_tokenizer(tokenizer_folder if request.param == "sentencepiece" else hugging_face_folder)


# U+2581 is how sentencepiece writes a space, so it comes back as one
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")), max_size=5))
@settings(max_examples=100, deadline=None)
def test_round_trip(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(0 <= token < tokenizer.vocab_size for ids in encoded for token in ids)
    assert [ids.tolist() for ids in tokenizer.encode_documents(texts)] == [[*ids, tokenizer.eod_id] for ids in encoded]
    assert [ids.tolist() for ids in encode_batch(tokenizer, texts, 0.5).documents()] == [
        [*ids, tokenizer.eod_id] if text else [] for text, ids in zip(texts, encoded, strict=True)
    ]


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    text = "a</s>b<|end|>c<s>d<unk>"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == text


def test_a_copy_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.copy_to(tmp_path)
    copy = load_tokenizer(tmp_path)
    assert (copy.sha256, copy.vocab_size, copy.eod_id) == (
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.eod_id,
    )
    assert copy.encode(["The same."]) == tokenizer.encode(["The same."])


def test_a_model_file_by_itself(tokenizer_folder: Path) -> None:
    assert load_tokenizer(tokenizer_folder / "tokenizer.model").sha256 == load_tokenizer(tokenizer_folder).sha256


def test_weights_next_to_a_tokenizer_are_ignored(hugging_face_folder: Path, tmp_path: Path) -> None:
    for path in hugging_face_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert load_tokenizer(tmp_path).sha256 == load_tokenizer(hugging_face_folder).sha256
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def with_a_gap(folder: Path, copy: Path, first: int, gap: int) -> Path:
    """The tokenizer with all ids from `first` on larger by `gap`."""
    copy.mkdir()
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {piece: number + gap * (number >= first) for piece, number in vocabulary.items()}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    (copy / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    return copy


@pytest.mark.parametrize(
    ("gap", "dtype"), [(30, "uint16"), (65_536 - 500, "uint16"), (65_537 - 500, "int32"), (10**6, "int32")]
)
def test_ids_with_gaps_are_kept(
    hugging_face_folder: Path, documents: list[str], tmp_path: Path, gap: int, dtype: str
) -> None:
    tokenizer = load_tokenizer(with_a_gap(hugging_face_folder, tmp_path / "gap", 300, gap))
    assert tokenizer.vocab_size == 500 + gap
    encoded = encode_batch(tokenizer, documents, 0.5)
    assert encoded.tokens.dtype == dtype
    assert encoded.tokens.max() >= 300 + gap
    assert [tokenizer.decode(tokens[:-1].tolist()) for tokens in encoded.documents()] == documents


def test_impossible_ids_are_refused(hugging_face_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="highest token id is 20000499, must be 0 to 16777215"):
        load_tokenizer(with_a_gap(hugging_face_folder, tmp_path / "gap", 300, 20_000_000))
    tokenizer = load_tokenizer(hugging_face_folder)
    for wrong in (500, 70_000, 2**31 + 5, 2**40, -1):
        monkeypatch.setattr(tokenizer, "encode", lambda texts, wrong=wrong: [[3, wrong] for _ in texts])
        with pytest.raises(DataError, match=f"token {wrong} outside the vocabulary of 500"):
            encode_batch(tokenizer, ["a", "b"], 0.5)


@pytest.mark.parametrize("given", ["EleutherAI/gpt-neox-20b", "gpt2", "data/tokenizr"])
def test_an_id_of_the_hub_that_cannot_be_reached_and_a_mistyped_folder(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        load_tokenizer(given)
    message = str(caught.value)
    assert message.startswith(
        f"tokenizer={given}: no such file or folder, and the Hugging Face hub returned no tokenizer for this id"
    )
    assert "give a folder with tokenizer.json" in message
    assert "\n" not in message


@pytest.mark.parametrize("given", ["a/b/c", "/a/b", "./a", "a.model", "a/tokenizer.json", "~/a", "org/name with space"])
def test_other_strings_are_not_searched_on_the_hub(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(DataError, match="no such file or folder. Train one"):
        load_tokenizer(given)
    with pytest.raises(DataError, match="no such file or folder. Train one"):
        load_tokenizer(Path("shards/tokenizer"))


def test_an_id_of_the_hub(hugging_face_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(hugging_face_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    tokenizer = load_tokenizer("org/name")
    assert asked[0][0] == "org/name"
    assert "tokenizer.json" in asked[0][1]
    tokenizer.copy_to(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == load_tokenizer(hugging_face_folder).sha256 == tokenizer.sha256


def test_a_tokenizer_without_an_end_lists_candidates(hugging_face_folder: Path, tmp_path: Path) -> None:
    def rename(name: str) -> None:
        text = (hugging_face_folder / "tokenizer.json").read_text()
        (tmp_path / "tokenizer.json").write_text(text.replace("<|end|>", name))

    for name in ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"):
        rename(name)
        with pytest.raises(DataError) as caught:
            load_tokenizer(tmp_path)
        assert f"has no eos_token, which must end documents; its vocabulary has {name}." in str(caught.value)
        config = re.search(r"{.*}", str(caught.value))
        assert config is not None
        (tmp_path / "tokenizer_config.json").write_text(config[0])
        assert load_tokenizer(tmp_path).eod_id == load_tokenizer(tmp_path / "tokenizer.json").eod_id == 0
        (tmp_path / "tokenizer_config.json").unlink()
    rename("<|stop|>")
    with pytest.raises(DataError, match="its vocabulary has none of the usual names"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "other.json")
    with pytest.raises(DataError, match=r"other\.json: move it to a folder of its own and rename it to tokenizer\.json"):
        load_tokenizer(tmp_path / "other.json")


def test_other_files_are_not_tokenizers(tmp_path: Path, hugging_face_folder: Path) -> None:
    with pytest.raises(DataError, match="tokenizer=nowhere: no such file or folder"):
        load_tokenizer("nowhere")
    with pytest.raises(DataError, match=r"contains neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_text("not a model")
    with pytest.raises(DataError, match=r"bad\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a Hugging Face tokenizer folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((hugging_face_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="has no eos_token"):
        load_tokenizer(tmp_path)
