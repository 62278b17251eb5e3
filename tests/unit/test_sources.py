"""The order of a source equals Megatron-Core's and needs few files and descriptors; damage is reported."""

import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from data_prep.errors import DataError
from data_prep.shards import Split, load_manifest
from mone_common import locks
from tests.tiny import make_shards
from train import sources
from train.data import micro_batches
from train.sources import ReadError, Source, reserve_descriptors

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of about 3000 tokens, and three of 600 for validation."""
    return make_shards(tmp_path_factory.mktemp("shards") / "a", name="a", shards_per_split=3)


def source(folder: Path, *, split: Split = "train", seed: int = 5, cache: Path | None = None) -> Source:
    return Source(load_manifest(folder), split, sequence_length=32, seed=seed, cache=cache or folder.parent / "cache")


def texts(of: Source, start: int, stop: int) -> list[list[int]]:
    return [of[i]["tokens"].tolist() for i in range(start, stop)]


class Vocabulary:
    """The tokenizer attributes that GPTDataset needs."""

    vocab_size, eod = 64, 0
    unique_identifiers = {"name": "tiny"}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("in_files", [False, True])
def test_the_order_is_that_of_megatron_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: Split, shards: int, in_files: bool
) -> None:
    if in_files:
        monkeypatch.setattr(sources, "SMALL_ORDER_BYTES", 0)
    folder = make_shards(tmp_path / "a", shards_per_split=shards)
    ours = source(folder, split=split, cache=tmp_path / "ours")
    blend = (load_manifest(folder).prefixes(split), None)
    for epoch in range(3):
        config = GPTDatasetConfig(
            random_seed=5 + epoch,
            sequence_length=32,
            blend_per_split=[blend if split == "train" else None, blend if split == "validation" else None, None],
            path_to_cache=str(tmp_path / "theirs"),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=Vocabulary(),
        )
        built = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
        theirs: Any = built[0] if split == "train" else built[1]
        assert len(theirs) == ours.size > 3
        for i in range(ours.size):
            sample, expected = ours[epoch * ours.size + i], theirs[i]
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                assert sample[name].dtype == expected[name].dtype
                assert torch.equal(sample[name], expected[name])


def test_a_tiny_source_in_a_long_run_takes_no_files(folder: Path, tmp_path: Path) -> None:
    tiny = source(folder, cache=tmp_path / "cache")
    texts(tiny, 0, tiny.size)
    descriptors = len(os.listdir("/dev/fd"))
    for epoch in range(300):
        tiny[epoch * tiny.size]
    assert len(os.listdir("/dev/fd")) == descriptors
    assert not (tmp_path / "cache").exists()


def test_the_orders_of_a_large_source_are_files_made_when_they_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts(source(folder), 0, 700)
    monkeypatch.setattr(sources, "SMALL_ORDER_BYTES", 0)
    large = source(folder, cache=tmp_path)
    epochs = -(-700 // large.size)
    large[0]
    assert len(list(tmp_path.glob("*.npy"))) == 2  # the interleaving of the shards, and the order of the first epoch
    assert texts(large, 0, 700) == expected
    assert len(list(tmp_path.glob("*.npy"))) == 1 + epochs
    descriptors = len(os.listdir("/dev/fd"))
    assert texts(large, 0, 700) == expected
    assert len(os.listdir("/dev/fd")) == descriptors

    for path in tmp_path.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:200])
    assert texts(source(folder, cache=tmp_path), 0, 700) == expected
    assert all(path.stat().st_size > 200 for path in tmp_path.glob("*.npy"))
    assert not list(tmp_path.glob(".unfinished*"))


def read_in_a_process(folder: Path, cache: Path, queue: Any) -> None:
    queue.put(texts(source(folder, cache=cache), 0, 700))


@pytest.mark.parametrize("with_locks", [True, False])
def test_runs_that_start_at_once_share_one_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_locks: bool
) -> None:
    expected = texts(source(folder), 0, 700)
    monkeypatch.setattr(sources, "SMALL_ORDER_BYTES", 0)
    if not with_locks:
        monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    started = [context.Process(target=read_in_a_process, args=(folder, tmp_path / "cache", queue)) for _ in range(5)]
    for process in started:
        process.start()
    assert [queue.get(timeout=60) for _ in started] == [expected] * 5
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 5
    assert not list((tmp_path / "cache").glob(".unfinished*"))


def no_locks(file: Any, operation: int) -> None:
    raise OSError(38, "Function not implemented")


def test_an_unwritable_cache_is_reported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL_ORDER_BYTES", 0)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data.index_cache=.*cache: cannot write there"):
        source(folder, cache=tmp_path / "cache").open_epoch(0)
    with pytest.raises(ReadError, match=r"data.index_cache=.*cache: cannot write there"):
        source(folder, cache=tmp_path / "cache")[0]


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """Limit the process to 20 more open files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("few_descriptors")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_many_shards_raise_the_limit_of_open_files(tmp_path: Path, num_workers: int) -> None:
    many = source(make_shards(tmp_path / "many", documents=200, shards_per_split=40))
    assert len(many.shards) == 40
    with pytest.raises(OSError, match="Too many open files"):
        texts(many, 0, many.size)
    many = source(tmp_path / "many")
    reserve_descriptors([many])
    batches = micro_batches(many, start=0, stop=200, micro_batch_size=4, data_rank=0, data_size=1, num_workers=num_workers)
    assert len(list(batches)) == 50


def test_more_shards_than_the_system_allows_open_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.resource, "getrlimit", lambda kind: (64, 64))
    message = r"data.blend: its 3 shards need \d+ open files, but the hard limit is 64.*ulimit -Hn.*shard_tokens"
    with pytest.raises(DataError, match=message):
        reserve_descriptors([source(folder)])


def forged(folder: Path, file: str, at: int, value: Any) -> None:
    """Overwrite some bytes without changing the size."""
    content = bytearray((folder / file).read_bytes())
    written = value.tobytes()
    content[at : at + len(written)] = written
    (folder / file).write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_token_beyond_the_vocabulary_is_reported_on_one_line(tmp_path: Path, num_workers: int) -> None:
    folder = make_shards(tmp_path / "a", name="a")
    forged(folder, "train-00000.bin", 200, np.uint16(900))
    with pytest.raises(ReadError) as caught:
        list(
            micro_batches(
                source(folder), start=0, stop=300, micro_batch_size=1, data_rank=0, data_size=1, num_workers=num_workers
            )
        )
    assert str(caught.value) == (
        f"data.blend: {folder}: train-00000.bin: token 900 outside the vocabulary of 64. "
        f"Run mone-verify path={folder} for a full list"
    )


def test_an_index_damaged_after_its_header_is_reported(tmp_path: Path) -> None:
    for number, (at, value) in enumerate({34: np.int32(5), 38: np.int32(-7), 34 + 4 * 200: np.int64(8)}.items()):
        folder = make_shards(tmp_path / str(number))
        forged(folder, "train-00000.idx", at, value)
        load_manifest(folder).check_sizes()
        with pytest.raises(ReadError, match=r"data.blend: .*: train-00000\.idx: .* Run mone-verify"):
            source(folder).open_epoch(0)


def pointing_nowhere(folder: Path) -> None:
    """Damage after the order was stored."""
    for document in range(200):
        forged(folder, "train-00000.idx", 34 + 4 * 200 + 8 * document, np.int64(10**9))


def no_last_bound(folder: Path) -> None:
    forged(folder, "train-00000.idx", 34 + 12 * 200 + 8 * 200, np.int64(7))


@pytest.mark.parametrize("damage", [pointing_nowhere, no_last_bound])
def test_a_damaged_index_with_a_stored_order_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(sources, "SMALL_ORDER_BYTES", 0)
    folder = make_shards(tmp_path / "a")
    source(folder, cache=tmp_path).open_epoch(0)
    damage(folder)
    with pytest.raises(ReadError, match=r"data.blend: .*: train-00000: damaged \(.*\)\. Run mone-verify"):
        source(folder, cache=tmp_path)[0]


@pytest.mark.parametrize("kind", ["order", "turns"])
@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), -1, 7])
def test_a_damaged_order_file_is_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, value: int
) -> None:
    monkeypatch.setattr(sources, "SMALL_ORDER_BYTES", 0)
    expected = source(folder, cache=tmp_path)[0]["tokens"]
    (path,) = tmp_path.glob(f"{kind}-*.npy")
    np.save(path, np.full_like(np.load(path), value))
    with pytest.raises(ReadError, match=rf"data.index_cache={tmp_path}: {path.name}: damaged \(.*\)\. Delete it"):
        source(folder, cache=tmp_path)[0]
    path.unlink()
    assert torch.equal(source(folder, cache=tmp_path)[0]["tokens"], expected)
