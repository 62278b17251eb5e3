"""A run folder has its own copy of the tokenizer, which works after a move."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data_prep.corpora import CorpusConfig
from data_prep.errors import DataError
from data_prep.shards import Manifest, load_manifest
from data_prep.tokenizer import load_tokenizer
from data_prep.tokenizer_training import TrainTokenizerConfig, train_tokenizer
from mone_common.console import UserError, showing_log
from mone_common.files import sha256_of
from mone_common.run_folder import DamagedFile
from mone_common.threshold_file import read_thresholds
from mone_model.hf.tokenizer import write_tokenizer
from tests.tiny import make_shards
from train.calibrate import CalibrateConfig, find_manifests
from train.config import RunConfig
from train.config_sections import ExecutionConfig, SourceConfig
from train.run_tokenizer import compare_tokenizers, keep_tokenizer
from train.trained_model import load_run_config


def with_tokenizer(folder: Path, vocab_size: int) -> Manifest:
    """Shards with a tokenizer that did not create their tokens."""
    make_shards(folder, name=folder.name, vocab_size=vocab_size)
    (folder.parent / "text.txt").write_text("\n\n".join(f"The number {n} and the number {n * n}." for n in range(300)))
    corpus = CorpusConfig(path=str(folder.parent / "text.txt"))
    train_tokenizer(TrainTokenizerConfig(corpus, str(folder / "tokenizer"), vocab_size=vocab_size))
    sha256 = sha256_of(folder / "tokenizer/tokenizer.model")
    dataclasses.replace(load_manifest(folder), tokenizer_sha256=sha256).save()
    return load_manifest(folder)


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    return with_tokenizer(tmp_path / "data", 300)


def run_on(data: Manifest, folder: Path) -> RunConfig:
    """The configuration of a run, written to its folder."""
    config = RunConfig(run=ExecutionConfig(dir=str(folder)))
    config.data.blend, config.data.index_cache = [SourceConfig(path=str(data.folder))], str(folder / "index_cache")
    folder.mkdir()
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    return config


def test_a_moved_run_has_its_tokenizer(data: Manifest, tmp_path: Path) -> None:
    run_on(data, tmp_path / "run")
    keep_tokenizer(tmp_path / "run", data, begun=False)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    shutil.rmtree(data.folder)
    config = load_run_config(moved)
    assert (config.run.dir, config.data.index_cache) == (str(moved), str(moved / "index_cache"))
    assert load_tokenizer(moved / "tokenizer").sha256 == data.tokenizer_sha256
    assert not list(moved.glob(".unfinished*"))
    with pytest.raises(UserError, match=r"data: no such folder of token shards.*on other shards.* data=\[FOLDER\]"):
        find_manifests(config, CalibrateConfig(run=str(moved)))
    other = with_tokenizer(tmp_path / "other", 310)
    with pytest.raises(UserError, match="other was tokenized with another tokenizer than .*moved/tokenizer"):
        find_manifests(config, CalibrateConfig(run=str(moved), data=[str(other.folder)]))
    again = with_tokenizer(tmp_path / "again", 300)
    assert find_manifests(config, CalibrateConfig(run=str(moved), data=[str(again.folder)])) == [again]


def test_initial_weights_of_another_tokenizer_give_a_warning(
    data: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(data.folder / "tokenizer", tmp_path / "run/tokenizer")
    for name in ("exported", "tokenizerless/of/another"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    write_tokenizer(data.folder / "tokenizer", tmp_path / "exported", context=64)
    for source in ("run", "run/checkpoints/step-00000001", "exported", "nothing"):
        compare_tokenizers(tmp_path / source, data)
    assert not caplog.messages
    other = with_tokenizer(tmp_path / "other", 310)
    for source in ("run", "run/checkpoints/step-00000001", "exported"):
        compare_tokenizers(tmp_path / source, other)
        assert f"init.source={tmp_path / source} has another tokenizer than {other.folder}" in caplog.messages[-1]
    shutil.copytree(data.folder / "tokenizer", tmp_path / "tokenizerless/tokenizer")
    compare_tokenizers(tmp_path / "tokenizerless/of/another", other)
    assert len(caplog.messages) == 3


def test_a_resume_requires_the_same_tokenizer(data: Manifest, tmp_path: Path) -> None:
    other = with_tokenizer(tmp_path / "other", 310)
    keep_tokenizer(tmp_path / "run", data, begun=False)
    keep_tokenizer(tmp_path / "run", data, begun=True)
    with pytest.raises(DataError, match="other was tokenized with another tokenizer than .*run/tokenizer"):
        keep_tokenizer(tmp_path / "run", other, begun=True)
    keep_tokenizer(tmp_path / "run", other, begun=False)
    assert load_tokenizer(tmp_path / "run/tokenizer").sha256 == other.tokenizer_sha256


def test_a_tokenizer_that_does_not_match_the_manifest_is_refused(data: Manifest, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tokenizer_sha256": "0" * 64, "vocab_size": 400}
    for name, value in changes.items():
        with pytest.raises(DataError, match=f"data: the manifest's {name} is {value}.*mone-verify"):
            keep_tokenizer(tmp_path / "run", dataclasses.replace(data, **{name: value}), begun=False)
        assert not (tmp_path / "run/tokenizer").exists()


def test_data_without_a_tokenizer_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = load_manifest(make_shards(tmp_path / "data"))
    with showing_log():
        keep_tokenizer(tmp_path / "run", manifest, begun=False)
    warning = f"warning: {manifest.tokenizer_path} is missing, so mone-sample will have no tokenizer\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize("text", [b"", b"a: [", b"\xff\xfe\x00", b"model: {num_layers: two}", b"foo: 1", None])
def test_a_damaged_configuration_is_reported(tmp_path: Path, text: bytes | None) -> None:
    if text is None:
        (tmp_path / "config.yaml").mkdir()
    else:
        (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"config.yaml is damaged, or of another version \(.+\)$"):
        load_run_config(tmp_path)


def test_a_file_at_the_path_of_the_tokenizer_is_reported(data: Manifest, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").write_text("mine")
    with pytest.raises(DataError, match="tokenizer is not a folder; remove it"):
        keep_tokenizer(tmp_path, data, begun=True)
    assert (tmp_path / "tokenizer").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 200_000])
def test_invalid_thresholds_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "thresholds.json").write_text(text)
    with pytest.raises(DamagedFile, match="is missing or not an output file of mone-calibrate"):
        read_thresholds(tmp_path / "thresholds.json")
    with pytest.raises(DamagedFile, match="not a regular file"):
        read_thresholds(Path("/dev/zero"))
