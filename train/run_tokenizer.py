"""The copy of the tokenizer in a run folder, which makes the folder independent of its data.

keep_tokenizer(Path("runs/demo"), manifests[0], begun=False)      # at the start of training
compare_tokenizers(Path("models/qwen"), manifests[0])             # warns if the initial weights belong to another one
"""

import logging
import shutil
from pathlib import Path

from data_prep.errors import DataError
from data_prep.shards import TOKENIZER_NAME, Manifest
from data_prep.tokenizer import load_tokenizer
from mone_common.files import writing_folder

logger = logging.getLogger(__name__)

SAMPLE = [
    "The quick brown fox jumps over 1234 lazy dogs.\n",
    "def f(x):\n    return x ** 2  # comment",
    "Zürich, 東京, Москва",
]
"""Texts that different tokenizers rarely encode equally."""


def keep_tokenizer(folder: Path, manifest: Manifest, *, begun: bool) -> None:
    """Copy the tokenizer of the data to a run folder, unless it is there.

    begun: whether the run resumes; its data must then have the same tokenizer as before.

    Raises DataError if the tokenizer of the data is not that of the manifest or of the run.
    """
    kept, source = folder / TOKENIZER_NAME, manifest.tokenizer_path
    if _same_files(kept, source):
        return
    if begun and kept.is_dir() and load_tokenizer(kept).sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"data.blend: {manifest.folder} was tokenized with another tokenizer than {kept}, that of this run; "
            "give data with that tokenizer, or another run.dir"
        )
    if kept.is_symlink() or (kept.exists() and not kept.is_dir()):
        raise DataError(f"run.dir={folder}: {kept} is not a folder; remove it, since the run copies its tokenizer there")
    if not source.is_dir():
        if not kept.is_dir():
            logger.warning("%s is missing, so mone-sample will have no tokenizer", source)
        return
    tokenizer = load_tokenizer(source)
    for name, here, there in (
        ("tokenizer_sha256", manifest.tokenizer_sha256, tokenizer.sha256),
        ("vocab_size", manifest.vocab_size, tokenizer.vocab_size),
    ):
        if here != there:
            raise DataError(
                f"data.blend: {manifest.folder}: the manifest's {name} is {here}, {source} has {there}. "
                f"Run mone-verify path={manifest.folder}, and tokenize again"
            )
    shutil.rmtree(kept, ignore_errors=True)
    with writing_folder(kept) as unfinished:
        tokenizer.copy_to(unfinished)


def compare_tokenizers(source: Path, manifest: Manifest) -> None:
    """Log a warning if the tokenizer of `init.source`, where there is one, encodes another way than that of the data.

    source: a Hugging Face folder, a run, or a checkpoint of a run.
    """
    if (source / "config.json").is_file():
        folder = source
    else:
        run = source.parent.parent if source.parent.name == "checkpoints" else source
        folder = run / TOKENIZER_NAME
    try:
        theirs, ours = load_tokenizer(folder), load_tokenizer(manifest.tokenizer_path)
    except DataError:
        return
    if ours.sha256 != theirs.sha256 and ours.encode(SAMPLE) != theirs.encode(SAMPLE):
        logger.warning(
            "init.source=%s has another tokenizer than %s, so its embeddings belong to other tokens; tokenize the text "
            "with tokenizer=%s",
            *(source, manifest.folder, folder),
        )


def _same_files(kept: Path, source: Path) -> bool:
    """Whether both are folders with the same files. This is faster than loading the tokenizers."""
    if not (kept.is_dir() and source.is_dir()):
        return False
    ours, theirs = ({path.name: path.read_bytes() for path in of.iterdir() if path.is_file()} for of in (kept, source))
    return ours == theirs
