"""mone-verify finds every kind of damage, and none in an intact folder."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import tokenize as tokenize_module
from data_prep import verify
from data_prep.corpora import CorpusConfig
from data_prep.errors import DataError
from data_prep.shards import Manifest, ShardWriter, load_manifest
from data_prep.tokenize import TokenizeConfig, tokenize
from data_prep.tokenizer import SentencePieceTokenizer
from mone_common.files import sha256_of
from tests.data_prep.conftest import InlinePool, made_up_documents, write_jsonl

pytestmark = pytest.mark.usefixtures("inline_pool")


@pytest.fixture(scope="module")
def intact(corpus_file: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact folder of token shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_module, "EncoderPool", InlinePool)
        config = TokenizeConfig(
            corpus=CorpusConfig(path=str(corpus_file)),
            tokenizer=str(tokenizer_folder),
            output=str(tmp_path_factory.mktemp("intact") / "shards"),
            validation_fraction=0.1,
            shard_tokens=2000,
        )
        return tokenize(config).folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(intact, tmp_path / "shards")


def flip_byte(path: Path, at: int) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def forge(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    """Rewrite the first shard's tokens, and the manifest so that size and checksum agree."""
    path = folder / "train-00000.bin"
    tokens = np.fromfile(path, np.uint16)
    change(tokens)
    tokens.tofile(path)
    edit_manifest(folder, lambda content: content["shards"][0].update(bin_sha256=sha256_of(path)))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the stored manifest."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_first(value: int) -> Callable[[np.ndarray], None]:
    """Overwrite the first token."""
    return lambda tokens: tokens.__setitem__(0, value)


def drop_first_end(tokens: np.ndarray) -> None:
    """Overwrite the first end-of-document."""
    tokens[np.flatnonzero(tokens == 2)[0]] = 5


def spell_start_in_bytes(tokens: np.ndarray) -> None:
    """Begin the first document with the byte pieces of "Do": valid text, but not as it is encoded."""
    tokens[:2] = [3 + ord("D"), 3 + ord("o")]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / "train-00001.bin").unlink(), r"train-00001\.bin: missing"),
    "truncated": (
        lambda f: os.truncate(f / "train-00001.idx", 40),
        r"train-00001\.idx: 40 bytes, the manifest",
    ),
    "altered tokens": (lambda f: flip_byte(f / "train-00002.bin", 100), r"train-00002\.bin: altered"),
    "altered index": (lambda f: flip_byte(f / "validation-00000.idx", 40), r"validation-00000\.idx: altered"),
    "out of range": (
        lambda f: forge(f, set_first(600)),
        r"train-00000\.bin: token 600 outside the vocabulary of 600",
    ),
    "no end": (
        lambda f: forge(f, drop_first_end),
        "train-00000: document 0 does not end with the end-of-document",
    ),
    "other tokens": (
        lambda f: forge(f, spell_start_in_bytes),
        "train-00000: document 0 decodes to text that encodes",
    ),
    "document count": (
        lambda f: edit_manifest(f, lambda m: m["shards"][0].update(documents=1)),
        r"train-00000\.idx: \d+ documents, the manifest says 1$",
    ),
    "token count": (
        lambda f: edit_manifest(f, lambda m: m["shards"][0].update(tokens=1)),
        r"train-00000\.idx: \d+ tokens, the manifest says 1$",
    ),
    "entropy": (
        lambda f: edit_manifest(f, lambda m: m.update(unigram_entropy=1.0)),
        r"unigram_entropy 1\.0, the",
    ),
    "tokenizer altered": (
        lambda f: (f / "tokenizer" / "tokenizer.model").open("ab").write(b"\x0a\x05\x0a\x03abc"),
        "tokenizer: not the tokenizer of the manifest",
    ),
    "tokenizer missing": (
        lambda f: (f / "tokenizer" / "tokenizer.model").unlink(),
        r"tokenizer: contains neither tokenizer\.model",
    ),
}


def forge_index(folder: Path, at: int, value: Any) -> None:
    """Overwrite bytes of the first shard's index, and the manifest so that the checksum agrees."""
    path = folder / "train-00000.idx"
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(value.tobytes())] = value.tobytes()
    path.write_bytes(content)
    edit_manifest(folder, lambda m: m["shards"][0].update(idx_sha256=sha256_of(path)))


def truncate_index(folder: Path, size: int) -> None:
    """Cut the first shard's index, and the manifest so that size and checksum agree."""
    path = folder / "train-00000.idx"
    os.truncate(path, size)
    edit_manifest(folder, lambda m: m["shards"][0].update(idx_sha256=sha256_of(path), idx_bytes=size))


INDEX_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "magic": (lambda f: forge_index(f, 0, np.uint8(0)), "not an index of Megatron-Core"),
    "version": (lambda f: forge_index(f, 9, np.uint64(2)), "index of version 2"),
    "type": (lambda f: forge_index(f, 17, np.uint8(4)), "token type has code 4"),
    "unknown type": (lambda f: forge_index(f, 17, np.uint8(99)), "token type has code 99"),
    "many documents": (lambda f: forge_index(f, 18, np.uint64(2**40)), f"{2**40} documents, the manifest says"),
    "many bounds": (lambda f: forge_index(f, 26, np.uint64(2**63)), f"{2**63} bounds of documents"),
    "truncated": (lambda f: truncate_index(f, 100), r"100 bytes, \d+ documents take"),
    "header truncated": (lambda f: truncate_index(f, 20), "20 bytes, too short for an index"),
    "length": (lambda f: forge_index(f, 34, np.int32(5)), r"\d+ tokens, the manifest says"),
    "negative length": (lambda f: forge_index(f, 34, np.int32(-5)), "document 0 has -5 tokens"),
    "places": (lambda f: forge_index(f, -16 - 8 * documents_in(f), np.int64(2**50)), "document .* does not start"),
    "last bound": (lambda f: forge_index(f, -8, np.int64(3)), "the bounds of its documents are not 0"),
}


def documents_in(folder: Path) -> int:
    """Of the first shard."""
    return load_manifest(folder).shards[0].documents


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_each_damage_of_an_index_is_named_even_if_its_checksum_agrees(
    folder: Path, call_main: Callable[..., Any], damage: str
) -> None:
    do, message = INDEX_DAMAGES[damage]
    do(folder)
    code, out, err = call_main(verify.main, f"path={folder}")
    assert code == 1
    assert not err
    assert re.search(rf"train-00000\.idx: {message}", out), out


MANIFEST_DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"vocab_size": "600"}, "vocab_size is '600', must be an integer"),
    "fraction": ({"vocab_size": 600.5}, "vocab_size is 600.5, must be an integer"),
    "true": ({"eod_id": True}, "eod_id is True, must be an integer"),
    "end": ({"eod_id": 600}, "eod_id is 600, must be below vocab_size 600"),
    "huge vocabulary": ({"vocab_size": 10**12, "dtype": "int32"}, "vocab_size is 1000000000000, must be"),
    "no vocabulary": ({"vocab_size": -1}, "vocab_size is -1, must be"),
    "type": ({"dtype": "int32"}, "dtype is 'int32', that of vocab_size 600 is 'uint16'"),
    "unknown type": ({"dtype": ["float"]}, r"dtype is \['float'\], must be a string"),
    "entropy": ({"unigram_entropy": None}, "unigram_entropy is None, must be a number"),
    "no number of an entropy": ({"unigram_entropy": float("nan")}, "unigram_entropy is nan"),
    "infinite entropy": ({"unigram_entropy": float("inf")}, "unigram_entropy is inf"),
    "huge entropy": ({"unigram_entropy": 10**400}, "unigram_entropy is 1000"),
    "negative entropy": ({"unigram_entropy": -1}, "unigram_entropy is -1"),
    "name": ({"name": 3}, "name is 3, must be a string"),
    "round trip": ({"round_trip": "yes"}, "round_trip is 'yes', must be true or false"),
    "records": ({"records": {"kept": "all"}}, "records.kept is 'all', must be a count"),
    "settings": ({"settings": []}, r"settings is \[\], must be an object"),
    "shards": ({"shards": {}}, "shards is {}, must be a list"),
    "format": ({"format": 1}, "format 1, this version reads"),
    "unknown": ({"more": 1}, "'more' is not a known field"),
    "tokenizer": ({"tokenizer_sha256": None}, "tokenizer_sha256 is None, must be a string"),
}
SHARD_DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "documents": ({"documents": "3"}, "shards.0.documents is '3', must be an integer"),
    "negative": ({"tokens": -3}, "shards.0.tokens is -3, must be positive"),
    "absolute name": ({"name": "/etc/passwd"}, "shards.0.name is '/etc/passwd', not the name of a file in the folder"),
    "parent": ({"name": "../a"}, "shards.0.name is '../a', not the name"),
    "long name": ({"name": "a" * 5000}, "shards.0.name is 'aaaaaaa.*, not the name"),
    "null name": ({"name": None}, "shards.0.name is None, must be a string"),
    "twice": ({"name": "train-00001"}, "shards.0.name is also the name of another shard"),
    "split": ({"split": "test"}, "shards.0.split is 'test', must be train or validation"),
    "checksum": ({"bin_sha256": 5}, "shards.0.bin_sha256 is 5, must be a string"),
    "size": ({"idx_bytes": [1]}, r"shards.0.idx_bytes is \[1\], must be an integer"),
}


@pytest.mark.parametrize("damage", [*MANIFEST_DAMAGES, *(f"shard: {name}" for name in SHARD_DAMAGES)])
def test_a_manifest_with_impossible_fields_is_named_and_never_trained_on(
    folder: Path, call_main: Callable[..., Any], damage: str
) -> None:
    change, message = MANIFEST_DAMAGES.get(damage) or SHARD_DAMAGES[damage.removeprefix("shard: ")]
    edit_manifest(folder, lambda m: (m["shards"][0] if damage.startswith("shard:") else m).update(change))
    code, out, err = call_main(verify.main, f"path={folder}")
    assert code == 1
    assert not err
    assert re.search(rf"^{folder}: manifest\.json: {message}", out, re.MULTILINE), out
    with pytest.raises(DataError, match=rf"manifest\.json: damaged \(.*{message}"):
        load_manifest(folder)


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 100_000, '{"shards": [5]}', "\x00"])
def test_an_invalid_manifest_is_an_error(folder: Path, call_main: Callable[..., Any], content: str) -> None:
    (folder / "manifest.json").write_text(content)
    code, out, err = call_main(verify.main, f"path={folder}")
    assert (code, err) == (1, "")
    assert out.startswith(f"{folder}: manifest.json: ")


def test_a_manifest_of_another_vocabulary_than_the_tokenizers_is_named(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(vocab_size=700, eod_id=5))
    found = list(verify.damages(load_manifest(folder), decode_documents=0))
    assert "manifest.json: vocab_size 700, the tokenizer has 600" in found
    assert "manifest.json: eod_id 5, the tokenizer has 2" in found


class LowerCase(SentencePieceTokenizer):
    """A tokenizer that normalises."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return super().encode([text.lower() for text in texts])


def test_with_a_lossy_tokenizer_texts_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_manifest(folder, lambda m: m.update(round_trip=False))
    assert list(verify.damages(load_manifest(folder))) == []
    monkeypatch.setattr(verify, "load_tokenizer", lambda path: LowerCase(path / "tokenizer.model"))
    found = list(verify.damages(load_manifest(folder), decode_documents=1))
    assert found[0] == "train-00000: document 0 decodes to text that encodes and decodes to another text"


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_listed(folder: Path, call_main: Callable[..., Any], damage: str) -> None:
    do, message = DAMAGES[damage]
    do(folder)
    found = list(verify.damages(load_manifest(folder)))
    assert any(re.search(message, line) for line in found), found
    code, out, _ = call_main(verify.main, f"path={folder}")
    assert code == 1
    assert out.splitlines() == [f"{folder}: {line}" for line in found]


def test_intact_folders_are_reported(
    folder: Path, options: Callable[..., TokenizeConfig], tmp_path: Path, call_main: Callable[..., Any]
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", made_up_documents(50, seed=1))
    tokenize(options({"path": str(other)}, output=str(tmp_path / "shards2")))
    code, out, _ = call_main(verify.main, f"path={tmp_path}/shards*")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [str(folder), f"{folder}2"]
    assert all(line.endswith("are intact") for line in out.splitlines())


def test_one_damaged_folder_of_two_is_enough(folder: Path, call_main: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "copy").symlink_to(folder)
    flip_byte(folder / "train-00000.bin", 0)
    code, out, _ = call_main(verify.main, f"path=[{folder},{tmp_path / 'copy'}]")
    assert code == 1
    assert len(out.splitlines()) == 2


def test_a_missing_folder_is_an_error_and_not_damage(tmp_path: Path, call_main: Callable[..., Any]) -> None:
    code, _, err = call_main(verify.main, f"path={tmp_path / 'none'}")
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'none'}: no such folder of token shards")


def test_a_folder_without_a_manifest_does_not_hide_the_others(
    folder: Path, tmp_path: Path, call_main: Callable[..., Any]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd/manifest.json").mkdir(parents=True)
    path = f"path=[{tmp_path}/empty,{tmp_path}/odd,{tmp_path}/none,{folder}]"
    code, out, err = call_main(verify.main, path)
    assert (code, err.count("error: ")) == (2, 3)
    assert out.endswith("are intact\n")
    flip_byte(folder / "train-00000.bin", 0)
    code, out, err = call_main(verify.main, path)
    assert (code, err.count("error: ")) == (1, 3)
    assert f"{folder}: train-00000.bin: altered" in out


def test_a_negative_number_of_documents_is_refused(folder: Path, call_main: Callable[..., Any]) -> None:
    code, _, err = call_main(verify.main, f"path={folder}", "decode_documents=-1")
    assert (code, err) == (2, "error: decode_documents=-1: must be at least 0\n")
    code, _, err = call_main(verify.main, f"path={folder}", "decode_documents=0")
    assert (code, err) == (0, "")


def test_sizes_alone_are_checked_before_training(folder: Path) -> None:
    manifest = load_manifest(folder)
    manifest.check_sizes()
    flip_byte(folder / "train-00000.bin", 0)
    manifest.check_sizes()  # reads no content
    os.truncate(folder / "train-00000.bin", 3)
    (folder / "validation-00000.idx").unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin has 3 bytes.*validation-00000\.idx is missing"):
        manifest.check_sizes()


def test_a_tokenizer_that_normalises_is_not_damage(folder: Path) -> None:
    manifest = load_manifest(folder)
    forge(folder, spell_start_in_bytes)
    lossy: Manifest = dataclasses.replace(load_manifest(folder), round_trip=False)
    changed = [line for line in verify.damages(lossy) if "decodes" in line]
    assert changed == []
    assert manifest.round_trip


def test_int32_where_the_vocabulary_needs_it(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train-00000", "train", "int32")
    writer.add(np.array([70_000, 2], np.int32))
    shard = writer.finish("made up:0 - made up:1")
    assert (shard.documents, shard.tokens, shard.bin_bytes) == (1, 2, 8)
    assert np.fromfile(tmp_path / "train-00000.bin", np.int32).tolist() == [70_000, 2]
