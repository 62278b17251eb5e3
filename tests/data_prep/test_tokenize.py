"""Shards contain the corpus, are reproducible, and continue only an unfinished run with the same settings."""

import errno
import fcntl
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from data_prep import journal
from data_prep import tokenize as tokenize_module
from data_prep.encoding import is_validation
from data_prep.errors import DataError
from data_prep.shards import Manifest, Split, load_manifest, megatron_indexed_dataset
from data_prep.tokenize import TokenizeConfig, tokenize
from data_prep.tokenizer import SentencePieceTokenizer, load_tokenizer
from mone_common import files
from mone_common.locks import LOCK_FILE, lock
from mone_common.run_folder import lock_run_folder
from tests.data_prep import conftest
from tests.data_prep.conftest import contents, made_up_documents, write_jsonl

Options = Callable[..., TokenizeConfig]


def texts_in(manifest: Manifest, split: Split) -> list[str]:
    """The documents of a split, decoded; asserts that each ends with the one end-of-document."""
    tokenizer = load_tokenizer(manifest.tokenizer_path)
    texts = []
    for prefix in manifest.prefixes(split):
        for tokens in megatron_indexed_dataset().IndexedDataset(prefix):
            assert np.flatnonzero(tokens == manifest.eod_id).tolist() == [len(tokens) - 1]
            texts.append(tokenizer.decode(tokens[:-1].tolist()))
    return texts


@pytest.mark.usefixtures("inline_pool")
def test_shards_hold_the_corpus_in_order(options: Options, documents: list[str]) -> None:
    tokenize(options())
    manifest = load_manifest(options().output)
    train, validation = texts_in(manifest, "train"), texts_in(manifest, "validation")
    assert train == [text for text in documents if not is_validation(text, 0.1)]
    assert validation == [text for text in documents if is_validation(text, 0.1)]
    assert validation
    assert (manifest.documents("train"), manifest.documents("validation")) == (len(train), len(validation))
    assert manifest.records == {"kept": len(documents)}
    assert manifest.name == "made_up"
    assert manifest.dtype == "uint16"
    assert manifest.round_trip
    manifest.check_sizes()


@pytest.mark.usefixtures("inline_pool")
def test_shards_are_of_bounded_size(options: Options) -> None:
    manifest = tokenize(options())
    groups = Counter[str]()
    longest = max(
        len(tokens)
        for prefix in manifest.prefixes("train") + manifest.prefixes("validation")
        for tokens in megatron_indexed_dataset().IndexedDataset(prefix)
    )
    for shard in manifest.shards:
        groups[shard.name[-5:]] += shard.tokens
    sizes = [groups[number] for number in sorted(groups)]
    assert len(sizes) > 5
    assert all(2000 <= size < 2000 + longest for size in sizes[:-1])


@pytest.mark.usefixtures("inline_pool")
def test_unigram_entropy_is_that_of_the_training_tokens(options: Options) -> None:
    manifest = tokenize(options())
    counts = Counter[int]()
    for prefix in manifest.prefixes("train"):
        for tokens in megatron_indexed_dataset().IndexedDataset(prefix):
            counts.update(tokens.tolist())
    total = counts.total()
    assert total == manifest.tokens("train")
    expected = -sum(count / total * math.log(count / total) for count in counts.values())
    assert manifest.unigram_entropy == pytest.approx(expected, rel=1e-9)


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_validation_fraction_holds_out_a_superset(text: str, one: float, other: float) -> None:
    text = text.encode("utf-8", "replace").decode()
    assert is_validation(text, min(one, other)) <= is_validation(text, max(one, other))
    assert not is_validation(text, 0)
    assert is_validation(text, 1)


def test_the_split_has_the_share_asked_for() -> None:
    held_out = sum(is_validation(text, 0.1) for text in made_up_documents(5000))
    assert 400 < held_out < 600


@pytest.mark.usefixtures("inline_pool")
def test_the_split_does_not_depend_on_order(options: Options, documents: list[str], tmp_path: Path) -> None:
    reverse = write_jsonl(tmp_path / "reverse.jsonl", reversed(documents))
    manifests = [
        tokenize(options()),
        tokenize(options({"path": str(reverse)}, output=str(tmp_path / "reverse"))),
    ]
    held_out = [sorted(texts_in(manifest, "validation")) for manifest in manifests]
    assert held_out[0] == held_out[1]


def test_any_number_of_workers_writes_the_same_bytes(options: Options, tmp_path: Path) -> None:
    folders = {workers: tmp_path / str(workers) for workers in (1, 3)}
    for workers, folder in folders.items():
        tokenize(options(output=str(folder), workers=workers))
    assert contents(folders[1]) == contents(folders[3])


@pytest.mark.usefixtures("inline_pool")
def test_a_finished_folder_is_left_alone(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize(options())
    before = {path: path.stat().st_mtime_ns for path in Path(options().output).rglob("*")}
    assert tokenize(options()) == first
    assert {path: path.stat().st_mtime_ns for path in Path(options().output).rglob("*")} == before


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize(
    ("changes", "corpus", "named"),
    [
        ({"validation_fraction": 0.2}, {}, "validation_fraction was 0.1, is now 0.2"),
        ({"shard_tokens": 3000}, {}, "shard_tokens was 2000, is now 3000"),
        ({}, {"on_invalid_utf8": "skip"}, "corpus.on_invalid_utf8 was 'error', is now 'skip'"),
        ({}, {"path": "other"}, "corpus.files.0.path was"),
        ({"tokenizer": "other"}, {}, "tokenizer_sha256 was"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_corpus_is_refused(
    options: Options,
    tmp_path: Path,
    tokenizer_folder: Path,
    finished: bool,
    changes: dict[str, Any],
    corpus: dict[str, Any],
    named: str,
) -> None:
    if finished:
        tokenize(options())
    else:
        stop_after_groups(options(), 2)
    if "path" in corpus:
        corpus = {"path": str(write_jsonl(tmp_path / "made_up.jsonl", ["Other text."])), "name": "made_up"}
    if "tokenizer" in changes:
        model = (tokenizer_folder / "tokenizer.model").read_bytes()
        (tmp_path / "other.model").write_bytes(model + b"\x0a\x05\x0a\x03abc")  # one more piece
        changes = {"tokenizer": str(tmp_path / "other.model")}
    before = contents(Path(options().output))
    with pytest.raises(DataError, match=f"shards: contains shards of another corpus, tokenizer or setting.*{named}"):
        tokenize(options(corpus, **changes))
    assert contents(Path(options().output)) == before


class Stop(Exception):
    """Ends a run at a chosen moment."""


def stop_after_groups(config: TokenizeConfig, groups: int) -> None:
    """Run until so many groups are recorded, then stop without cleanup."""
    with pytest.MonkeyPatch.context() as patch:
        save = journal.Journal._save

        def save_or_stop(self: journal.Journal) -> None:
            save(self)
            if self.groups == groups:
                raise Stop

        patch.setattr(journal.Journal, "_save", save_or_stop)
        with pytest.raises(Stop):
            tokenize(config)


def stop_before_rename(config: TokenizeConfig, number: int) -> None:
    """Run until the number-th rename, then stop before it; shards and the journal become final by renames."""
    renames = 0
    replace = os.replace

    def replace_or_stop(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if renames == number:
            raise Stop
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", replace_or_stop)
        with pytest.raises(Stop):
            tokenize(config)


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize("rename", range(1, 13))
def test_a_run_stopped_at_any_rename_continues_to_the_same_bytes(options: Options, tmp_path: Path, rename: int) -> None:
    tokenize(options(output=str(tmp_path / "undisturbed")))
    stop_before_rename(options(), rename)
    assert not (tmp_path / "shards" / "manifest.json").exists()
    tokenize(options())
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")


@pytest.mark.usefixtures("inline_pool")
def test_files_of_an_unrecorded_group_are_removed(options: Options, tmp_path: Path) -> None:
    stop_before_rename(options(), 7)  # both shards have their final names, but the journal has none
    assert (tmp_path / "shards" / "validation-00000.idx").exists()
    other = {"validation_fraction": 0.0}
    tokenize(options(**other))
    tokenize(options(output=str(tmp_path / "undisturbed"), **other))
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")


@pytest.mark.usefixtures("inline_pool")
def test_continuing_leaves_finished_shards_alone(options: Options) -> None:
    stop_after_groups(options(), 3)
    folder = Path(options().output)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("[tv]*.bin")}
    assert {f"train-0000{number}.bin" for number in range(3)} <= {path.name for path in times}
    tokenize(options())
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.usefixtures("inline_pool")
def test_a_damaged_shard_is_not_continued(options: Options) -> None:
    stop_after_groups(options(), 2)
    os.truncate(Path(options().output) / "train-00001.bin", 10)
    with pytest.raises(DataError, match=r"output=.*shard train-00001\.bin has 10 bytes, the manifest says"):
        tokenize(options())


@pytest.mark.usefixtures("inline_pool")
def test_a_full_disk_keeps_finished_shards(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize(options(output=str(tmp_path / "undisturbed")))
    fsync = os.fsync
    calls = 0

    def fsync_or_full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync_or_full)
        with pytest.raises(DataError, match=r"output=.*shards: no space left in this folder"):
            tokenize(options())
    assert (tmp_path / "shards" / "train-00000.bin").exists()
    assert not list((tmp_path / "shards").glob(".unfinished-*"))  # what is of no use gives its room back
    tokenize(options())
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")


@pytest.mark.usefixtures("inline_pool")
def test_a_finished_folder_needs_no_permission_to_write(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize(options())
    monkeypatch.setattr(tokenize_module, "lock", None)
    assert tokenize(options()) == first


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize(("fraction", "warns"), [(0.1, True), (0.0, False)])
def test_a_split_without_validation_gives_a_warning(
    options: Options, tmp_path: Path, call_main: Callable[..., Any], fraction: float, warns: bool
) -> None:
    (tmp_path / "one.txt").write_text("A text.\n\nAll of it is one document.\n")
    changed = options(validation_fraction=fraction)
    code, _, err = call_main(
        tokenize_module.main,
        f"corpus.path={tmp_path}/one.txt",
        "corpus.sample_by=document",
        *(f"{name}={getattr(changed, name)}" for name in ("tokenizer", "output", "validation_fraction")),
    )
    assert code == 0
    assert ("no document is held out for validation" in err) == warns
    assert not warns or "validation_fraction=0.1 of 1 documents is none: raise it, or split the text" in err


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["shards"][0].update(name=5),
        lambda content: content["shards"][0].update(bin_bytes="many"),
        lambda content: content.update(unigrams=3, shards=[7]),
        lambda content: content.update(position=5),
        lambda content: content.update(records=[1]),
        lambda content: content.update(unigrams=[1, 2]),
        lambda content: content.pop("groups"),
        lambda content: content.update(position=[0, -1]),
        lambda content: content.update(position=[0, "9"]),
        lambda content: content.update(position=[0, 1.5]),
        lambda content: content.update(position=[0, True]),
        lambda content: content.update(position=[1, 0]),
        lambda content: content.update(position=[0, 10**30]),
        lambda content: content["position"].append(0),
        lambda content: content.update(groups=3),
        lambda content: content.update(groups=-1),
        lambda content: content["shards"].pop(0),
        lambda content: content["shards"][0].update(name="train-7", split="train"),
        lambda content: content["shards"][0].update(name="model"),
        lambda content: content["records"].update(empty=-3),
        lambda content: content["records"].update(kept="all"),
        lambda content: content["records"].update(kept=content["records"]["kept"] + 1),
        lambda content: content["unigrams"].__setitem__(5, -1),
        lambda content: content["unigrams"].__setitem__(5, content["unigrams"][5] + 1),
        lambda content: content["unigrams"].__setitem__(5, 0.5),
        lambda content: content.update(unigrams=[content["unigrams"]]),
        lambda content: content.update(unigrams=[str(count) for count in content["unigrams"]]),
        lambda content: content["settings"].pop("corpus"),
    ],
)
def test_a_damaged_journal_is_named(options: Options, damage: Callable[[dict[str, Any]], Any]) -> None:
    stop_after_groups(options(), 2)
    path = Path(options().output) / "progress.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"progress\.json: damaged.*Remove the folder and start again"):
        tokenize(options())


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_an_invalid_journal_is_an_error(options: Options, content: str) -> None:
    path = Path(options().output) / "progress.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DataError, match=r"progress\.json: damaged.*Remove the folder and start again"):
        tokenize(options())


@pytest.mark.usefixtures("inline_pool")
def test_a_position_after_the_end_of_a_file_is_an_error(options: Options, corpus_file: Path) -> None:
    stop_after_groups(options(), 2)
    path = Path(options().output) / "progress.json"
    content = json.loads(path.read_text())
    content["records"]["empty"] = 1000
    content["position"][1] += 1000
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"made_up\.jsonl, record \d+: .* the file has only 300 records.*Remove that folder"):
        tokenize(options())


@pytest.mark.usefixtures("inline_pool")
def test_the_users_files_in_the_output_folder_stay(options: Options, tmp_path: Path) -> None:
    stop_before_rename(options(), 7)
    mine = {"backup.bin", "train.idx", "train-00000.bin.old", ".unfinished-notes", "train-1.bin"}
    for name in mine:
        (tmp_path / "shards" / name).write_text("precious")
    for name in ("train-00009.bin", ".unfinished-validation-00001.idx"):
        (tmp_path / "shards" / name).write_text("of an unfinished run")
    (tmp_path / "shards/.unfinished-tokenizer").mkdir()
    tokenize(options())
    tokenize(options(output=str(tmp_path / "undisturbed")))
    assert {name: b"precious" for name in mine} == {
        name: content
        for name, content in contents(tmp_path / "shards").items()
        if name not in contents(tmp_path / "undisturbed")
    }


@pytest.mark.usefixtures("inline_pool")
def test_the_last_records_may_give_no_document(options: Options, tmp_path: Path, documents: list[str]) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [*documents[:100], "", " "]))
    undisturbed = tokenize(options({"path": path}, output=str(tmp_path / "undisturbed"), shard_tokens=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_module, "publish_manifest", lambda *_: None)
        tokenize(options({"path": path}, shard_tokens=100))
    assert tokenize(options({"path": path}, shard_tokens=100)).records == undisturbed.records == {"empty": 2, "kept": 100}
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")


@pytest.fixture
def hugging_face_folder(documents: list[str], tmp_path: Path) -> Path:
    """A tokenizer of the kind that `load_tokenizer` prefers to a sentencepiece model beside it."""
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(documents, vocab_size=500, special_tokens=["<|end|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, eos_token="<|end|>").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize("hugging_face_first", [True, False])
def test_a_tokenizer_of_an_earlier_attempt_is_replaced(
    options: Options, tmp_path: Path, tokenizer_folder: Path, hugging_face_folder: Path, hugging_face_first: bool
) -> None:
    first, second = hugging_face_folder, tokenizer_folder
    if not hugging_face_first:
        first, second = second, first
    with pytest.raises(DataError, match="no field 'body'"):
        tokenize(options({"text_field": "body"}, tokenizer=str(first)))
    manifest = tokenize(options(tokenizer=str(second)))
    assert load_tokenizer(manifest.tokenizer_path).sha256 == manifest.tokenizer_sha256
    tokenize(options(tokenizer=str(second), output=str(tmp_path / "undisturbed")))
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer/tokenizer.model"])
def test_the_copy_of_the_tokenizer_may_be_named_to_continue(options: Options, tmp_path: Path, name: str) -> None:
    stop_after_groups(options(), 2)
    tokenize(options(tokenizer=f"{tmp_path}/shards/{name}"))
    tokenize(options(output=str(tmp_path / "undisturbed")))
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")


@pytest.mark.usefixtures("inline_pool")
def test_a_tokenizer_that_is_not_of_an_earlier_attempt_is_left_alone(
    options: Options, tmp_path: Path, hugging_face_folder: Path
) -> None:
    (tmp_path / "shards").mkdir()
    hugging_face_folder.rename(tmp_path / "shards/tokenizer")
    before = contents(tmp_path / "shards/tokenizer")
    for _ in range(2):
        with pytest.raises(DataError, match="shards/tokenizer: does not contain tokenizer="):
            tokenize(options())
    assert contents(tmp_path / "shards/tokenizer") == before


class LosesCharacters(SentencePieceTokenizer):
    """A tokenizer that loses characters of some texts."""

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        return super().encode_documents([text.replace("lost", "") for text in texts])


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize("shard_tokens", [2000, 10**6])
def test_characters_that_are_lost_late_in_the_corpus_are_noticed(
    options: Options, tmp_path: Path, documents: list[str], shard_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*documents[:50], *(f"{text} lost" for text in documents[50:])])
    assert tokenize(options({"path": str(path)}, shard_tokens=shard_tokens)).round_trip
    monkeypatch.setattr(conftest, "load_tokenizer", lambda path: LosesCharacters(Path(path) / "tokenizer.model"))
    lossy = options({"path": str(path)}, shard_tokens=shard_tokens, output=str(tmp_path / "lossy"))
    assert not tokenize(lossy).round_trip


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize("name", ["manifest.json", ".lock", "progress.json"])
def test_a_folder_with_the_name_of_a_file_is_an_error(options: Options, name: str) -> None:
    (Path(options().output) / name).mkdir(parents=True)
    with pytest.raises(DataError, match=rf"output=.*{name}"):
        tokenize(options())


@pytest.mark.usefixtures("inline_pool")
def test_shards_of_unknown_origin_are_left_alone(options: Options) -> None:
    folder = Path(options().output)
    folder.mkdir()
    (folder / "other.bin").write_bytes(b"precious")
    with pytest.raises(DataError, match="contains 1 shard files but neither progress.json nor a manifest"):
        tokenize(options())
    assert contents(folder) == {"other.bin": b"precious"}


@pytest.mark.usefixtures("inline_pool")
def test_only_one_run_writes_to_a_folder(options: Options) -> None:
    folder = Path(options().output)
    folder.mkdir()
    with open(folder / LOCK_FILE, "w") as file:
        assert lock(file)
        with pytest.raises(DataError, match="another mone-tokenize is writing to it"):
            tokenize(options())
    tokenize(options())


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_gives_one_warning(
    options: Options, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = Path(options().output)
    assert tokenize(options()).documents("train")
    with lock_run_folder(folder):  # as a run locks its folder
        pass
    assert caplog.text.count(f"{folder}: this file system has no locks ({os.strerror(number)})") == 1


@pytest.mark.usefixtures("inline_pool")
def test_the_lock_file_is_open_for_writing(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS implements flock by fcntl locks, which need write access."""
    flock, modes = fcntl.flock, []

    def flock_as_nfs(file: Any, operation: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        modes.append(mode)
        if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_as_nfs)
    tokenize(options())
    assert modes == [os.O_WRONLY]


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_an_empty_corpus(options: Options, tmp_path: Path, documents: list[str], texts: list[str]) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", texts)
    with pytest.raises(DataError, match=r"empty: no document for training \(records: (no record at all|2 empty)\)"):
        tokenize(options({"path": str(empty)}))
    tokenize(options())  # nothing stands in the way of the right corpus


@pytest.mark.usefixtures("inline_pool")
def test_records_are_counted_by_fate(options: Options, tmp_path: Path) -> None:
    lines = [b"Good.", b"", b"Bad \xff.", b" ", b"Worse \xfe\xff."]
    (tmp_path / "mixed.jsonl").write_bytes(b"".join(b'{"text": "%s"}\n' % line for line in lines))
    for policy, fate in (("replace", "invalid_utf8_replaced"), ("skip", "invalid_utf8_skipped")):
        corpus = {"path": str(tmp_path / "mixed.jsonl"), "on_invalid_utf8": policy}
        manifest = tokenize(options(corpus, output=str(tmp_path / policy), validation_fraction=0))
        assert manifest.records == {"empty": 2, fate: 2, "kept": 1}
        assert manifest.documents("train") == (3 if policy == "replace" else 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 1.0}, r"validation_fraction=1\.0: must be at least 0 and below 1"),
        ({"workers": 0}, "workers=0: must be at least 1"),
        ({"shard_tokens": 0}, "shard_tokens=0: must be at least 1"),
    ],
)
def test_invalid_options(options: Options, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        options(**changes)


def test_folders_without_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder of token shards. Create it with: mone-tokenize"):
        load_manifest("nowhere")
    with pytest.raises(DataError, match="no manifest.json, so the tokenization has not finished"):
        load_manifest(tmp_path)
    for content in ("{", "[]", '{"format": "other", "shards": []}', '{"shards": [{"a": 1}]}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=r"manifest\.json: (damaged|format 'other')"):
            load_manifest(tmp_path)
