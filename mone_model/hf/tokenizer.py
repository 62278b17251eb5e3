"""A tokenizer that `transformers.AutoTokenizer` loads without sentencepiece, and that encodes as the one of the run does.

    write_tokenizer(Path("runs/demo/tokenizer"), Path("exported"), context=256)

Hugging Face tokenizers are copied. A sentencepiece model becomes a tokenizer.json, which is compared with the model on
texts that are difficult to encode.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from mone_common.console import UserError

SENTENCEPIECE = "tokenizer.model"
HUGGING_FACE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
"""Files of a Hugging Face tokenizer."""
SPACE = "\u2581"
"""What sentencepiece writes in place of a space."""
DIFFICULT = (
    "",
    " ",
    "a",
    " leading",
    "  two",
    "trailing  ",
    "a  b\n\n\tc\r\n",
    "1234567890",
    "<s></s><unk><0x0A>",
    "\0\x01\x1b\x7f",
    "\u00a0\u200b\u200d\ufeff\u2028\u2581",
    "äöüß ñ Ελληνικά русский 日本語 한국어 العربية",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "The quick brown fox (jumps) over 'the' \"lazy\" dog's back; isn't it? 3.14e-5!",
    "def f(x):\n    return x[0] ** 2  # comment",
)
"""Texts for the comparison."""


def write_tokenizer(source: Path, output: Path, *, context: int) -> None:
    """Write the tokenizer in the folder `source` into the existing folder `output`; context: longest text in tokens.

    Raises UserError if there is no tokenizer, or it cannot be converted exactly.
    """
    if any((source / name).is_file() for name in HUGGING_FACE[:2]):
        for name in HUGGING_FACE:
            if (source / name).is_file():
                shutil.copyfile(source / name, output / name)
        return
    if not (source / SENTENCEPIECE).is_file():
        raise UserError(f"{source}: holds neither {SENTENCEPIECE} nor {' nor '.join(HUGGING_FACE[:2])}")
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(source / SENTENCEPIECE))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{source / SENTENCEPIECE}: not a sentencepiece model ({error})") from error
    tokenizer = convert(model)
    texts = [*DIFFICULT, " ".join(DIFFICULT)]
    for text in texts:
        ours, theirs = model.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs or tokenizer.decode(ours) != model.decode(ours):
            raise UserError(
                f"{source / SENTENCEPIECE}: cannot be converted: sentencepiece encodes {text!r} as {ours}, the converted "
                f"tokenizer as {theirs}. Train a tokenizer with mone-train-tokenizer, or use a Hugging Face tokenizer"
            )
    tokenizer.encode_special_tokens = False  # tokenizer_config.json has this setting
    tokenizer.save(str(output / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        # As in training: the text of a special token is plain text.
        "split_special_tokens": True,
        "unk_token": model.id_to_piece(model.unk_id()),
        "eos_token": model.id_to_piece(model.eos_id()),
        "pad_token": model.id_to_piece(model.pad_id() if model.pad_id() >= 0 else model.eos_id()),
        "padding_side": "left",
    }
    if model.bos_id() >= 0:
        settings["bos_token"] = model.id_to_piece(model.bos_id())
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def convert(model: Any) -> Any:
    """The `tokenizers.Tokenizer` that encodes and decodes as a `SentencePieceProcessor` does."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE, Unigram

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
    rules, pieces = proto.normalizer_spec, list(proto.pieces)
    plain = [piece.type in (piece.NORMAL, piece.USER_DEFINED) for piece in pieces]
    byte_fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        ids = {piece.piece: number for number, piece in enumerate(pieces)}
        tokenizer = Tokenizer(
            BPE(
                ids,
                _merges(pieces, plain),
                unk_token=pieces[model.unk_id()].piece,
                byte_fallback=byte_fallback,
                fuse_unk=True,
            )
        )
    elif proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        # Below all others, so that a text is never cut into the names of special or byte tokens.
        lowest = min((piece.score for piece, is_plain in zip(pieces, plain, strict=True) if is_plain), default=0.0) - 1e3
        scores = [(piece.piece, piece.score if is_plain else lowest) for piece, is_plain in zip(pieces, plain, strict=True)]
        tokenizer = Tokenizer(Unigram(scores, model.unk_id(), byte_fallback))
    else:
        raise UserError("a sentencepiece model that is neither bpe nor unigram cannot be converted")
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*ends, decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else ends)
    special = [piece.piece for piece in pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    own = [piece.piece for piece in pieces if piece.type == piece.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in own])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _merges(pieces: list[Any], plain: list[bool]) -> list[tuple[str, str]]:
    """Pairs of pieces that form a piece, in the order in which sentencepiece merges them: by the score of the result."""
    scores = {piece.piece: piece.score for piece, is_plain in zip(pieces, plain, strict=True) if is_plain}
    found = []
    for name, score in scores.items():
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in scores and right in scores:
                found.append((-score, -scores[left], left, right))
    return [(left, right) for _, _, left, right in sorted(found)]
