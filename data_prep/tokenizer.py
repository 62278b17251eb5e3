"""Tokenizers: load a sentencepiece model or a Hugging Face tokenizer, encode and decode.

tokenizer = load_tokenizer("data/demo/tokenizer")   # or a .model file, a Hugging Face folder or hub id
tokens = tokenizer.encode(["Hello, world."])        # [[271, 119, ...]], no special tokens added
tokenizer.decode(tokens[0])                         # "Hello, world."
"""

import hashlib
import os
import re
import shutil
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.shards import MAX_VOCABULARY
from mone_common.files import sha256_of

MODEL_NAME = "tokenizer.model"
HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = {
    *HUGGING_FACE_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    MODEL_NAME,
}
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ENDS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
    "<|end|>",
    "<end>",
)
"""End-of-document tokens of common tokenizers."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""
    eod_id: int
    """Token that ends a document: the tokenizer's end-of-sentence token."""
    sha256: str
    """Checksum of the files of the tokenizer; tokenizers with equal checksums encode equally."""

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, in one thread; special tokens are neither added nor recognised in the text."""

    @abstractmethod
    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Like `encode`, but each text becomes an array [length] that ends with `eod_id`."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, without special tokens."""

    @abstractmethod
    def file_names(self) -> list[str]:
        """The names of the files that `copy_to` writes."""

    @abstractmethod
    def copy_to(self, folder: Path) -> None:
        """Write the files that `load_tokenizer` needs to an existing folder."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._path = path
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: not a sentencepiece model ({error})") from error
        self.vocab_size = self._model.vocab_size()
        self.eod_id = self._model.eos_id()
        if self.eod_id < 0:
            raise DataError(f"{path}: has no end-of-sentence token, which must end documents; train it with an eos_id")
        self.sha256 = sha256_of(path)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; the model encodes in one thread."""
        return self._model.encode(texts, num_threads=1)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text as an array [length]; the model appends `eod_id`."""
        return self._model.encode(texts, num_threads=1, return_type="numpy", add_eos=True)

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; control pieces leave nothing."""
        return self._model.decode(tokens)

    def file_names(self) -> list[str]:
        """The model file alone."""
        return [MODEL_NAME]

    def copy_to(self, folder: Path) -> None:
        """Copy the model file into an existing folder."""
        shutil.copyfile(self._path, folder / MODEL_NAME)


class HuggingFaceTokenizer(Tokenizer):
    """A folder that `transformers.AutoTokenizer` loads."""

    def __init__(self, folder: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the worker processes run in parallel
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises plain Exception for damaged files
            raise DataError(f"{folder}: not a Hugging Face tokenizer folder ({_first_line(error)})") from error
        vocabulary = self._tokenizer.get_vocab()
        # This may exceed the number of tokens, because ids may have gaps.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MAX_VOCABULARY:
            raise DataError(f"{folder}: its highest token id is {self.vocab_size - 1}, must be 0 to {MAX_VOCABULARY - 1}")
        if self._tokenizer.eos_token_id is None:
            raise DataError(_no_end(folder, vocabulary))
        self.eod_id = self._tokenizer.eos_token_id
        self._folder = folder
        self.sha256 = hashlib.sha256("".join(map(sha256_of, self._files())).encode()).hexdigest()

    def _files(self) -> list[Path]:
        """Files of the tokenizer; the folder may contain other files, e.g. weights of a model."""
        own = {*self._tokenizer.vocab_files_names.values(), *TOKENIZER_FILES}
        return [path for path in sorted(self._folder.iterdir()) if path.name in own]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; the text of a special token is encoded as plain text."""
        if not texts:  # transformers cannot encode an empty list
            return []
        return self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text as an int64 array [length] that ends with `eod_id`."""
        return [np.array([*ids, self.eod_id], np.int64) for ids in self.encode(texts)]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, without special tokens and with all spaces."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def file_names(self) -> list[str]:
        """The names of the tokenizer's own files, sorted."""
        return [path.name for path in self._files()]

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's own files into an existing folder, and no weights beside them."""
        for path in self._files():
            shutil.copyfile(path, folder / path.name)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.

    path: a sentencepiece `.model` file, a folder of mone-train-tokenizer, a Hugging Face tokenizer folder, or the id of a
    tokenizer on the Hugging Face hub such as EleutherAI/gpt-neox-20b. Only a string can be an id.

    Raises DataError if there is no tokenizer, or it has no end-of-sentence token.
    """
    given, path = path, Path(path)
    if not path.exists():
        path = _from_hub(given)
    if path.is_file() and path.suffix == ".json":
        if path.name != HUGGING_FACE_FILES[0]:
            raise DataError(f"tokenizer={path}: move it to a folder of its own and rename it to tokenizer.json")
        path = path.parent
    if path.is_file():
        return SentencePieceTokenizer(path)
    if any((path / name).is_file() for name in HUGGING_FACE_FILES):
        return HuggingFaceTokenizer(path)
    if (path / MODEL_NAME).is_file():
        return SentencePieceTokenizer(path / MODEL_NAME)
    raise DataError(f"tokenizer={given}: contains neither {MODEL_NAME} nor {' nor '.join(HUGGING_FACE_FILES)}")


def _from_hub(given: str | Path) -> Path:
    """Folder of the local cache with the tokenizer of a hub id; downloads it if needed."""
    missing = f"tokenizer={given}: no such file or folder"
    how = "Train one with mone-train-tokenizer output=FOLDER, or give a folder with tokenizer.json and tokenizer_config.json"
    if isinstance(given, Path) or not HUB_ID.fullmatch(given) or given.endswith((".model", ".json")):
        raise DataError(f"{missing}. {how}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(given, allow_patterns=[*sorted(TOKENIZER_FILES), "*.model", "*.spm", "*.bpe"]))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{missing}, and the Hugging Face hub returned no tokenizer for this id ({_first_line(error)}). {how}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _no_end(folder: Path, vocabulary: dict[str, int]) -> str:
    """Error message for a tokenizer without eos_token, with the way to set it."""
    candidates = [piece for piece in ENDS if piece in vocabulary]
    found = f"its vocabulary has {' and '.join(candidates)}" if candidates else "its vocabulary has none of the usual names"
    config = f'"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{candidates[0] if candidates else "PIECE"}"'
    return (
        f"{folder}: has no eos_token, which must end documents; {found}. Set it in {folder / HUGGING_FACE_FILES[1]}, "
        f"for example {{{config}}}"
    )
