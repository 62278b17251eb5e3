"""mone-verify finds every kind of damage, and none in a folder as it was written."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import verify
from data_prep.errors import DataError
from data_prep.files import sha256_of
from data_prep.shards import Manifest, ShardWriter, load_manifest
from data_prep.tokenize import TokenizeConfig, tokenize
from tests.data_prep.conftest import made_up_documents, write_jsonl

pytestmark = pytest.mark.usefixtures("inline_pool")


@pytest.fixture
def folder(options: Callable[..., TokenizeConfig]) -> Path:
    """An intact folder of token shards."""
    return tokenize(options()).folder


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
        "tokenizer: another tokenizer than the manifest's",
    ),
    "tokenizer missing": (
        lambda f: (f / "tokenizer" / "tokenizer.model").unlink(),
        r"tokenizer: holds neither tokenizer\.model",
    ),
}


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


def test_no_folder_is_no_damage_but_an_error(tmp_path: Path, call_main: Callable[..., Any]) -> None:
    code, _, err = call_main(verify.main, f"path={tmp_path / 'none'}")
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'none'}: no such folder of token shards")


def test_sizes_alone_are_checked_before_training(folder: Path) -> None:
    manifest = load_manifest(folder)
    manifest.check_sizes()
    flip_byte(folder / "train-00000.bin", 0)
    manifest.check_sizes()  # reads no content
    os.truncate(folder / "train-00000.bin", 3)
    (folder / "validation-00000.idx").unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin has 3 bytes.*validation-00000\.idx is missing"):
        manifest.check_sizes()


def test_a_tokenizer_that_normalises_is_no_damage(folder: Path) -> None:
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
