"""Scores the text of documents: negative log-likelihood of each token, in a sliding window.

    scores = score_documents(model, documents, window=2048, stride=1024, begin=beginning_of(tokenizer))
    scores.nll_N, scores.tokens_N, scores.tokens_per_second

Legend: N documents, W windows, B windows of a batch, T tokens of the longest of them, V vocabulary, P scored predictions.

Time is that of the model's own forward passes: the output projection is computed for the scored part of a window only, and
the log-likelihood a few rows at a time, without a copy of all logits.
"""

import inspect
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mone_common.console import UserError
from mone_common.text import clock
from mone_eval.documents import Document
from mone_eval.windows import IGNORED, Window, collate, cut, group, sum_by_document

logger = logging.getLogger(__name__)

LOGITS_BYTES = 1 << 31
"""Largest size of the logits of a batch; a batch has at least one window."""
ROWS_NUMBERS = 1 << 20
"""Logits of which the log-likelihood is computed at a time; they fit in a cache."""


@dataclass(frozen=True)
class Scores:
    """Scores of documents, and what they cost."""

    nll_N: torch.Tensor
    """[N] float64: summed negative log-likelihood of each document, nats."""
    tokens_N: torch.Tensor
    """[N] int64: scored tokens of each document."""
    read_tokens: int
    """Tokens that the model read, context included."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second."""
        return int(self.tokens_N.sum()) / max(self.seconds, 1e-9)


def beginning_of(tokenizer: Any) -> int | None:
    """The token that comes before a document; None if the tokenizer has none.

    The one that the tokenizer itself puts before a text. Else the one that ends a document: in training, documents follow
    each other. A tokenizer may name a beginning-of-sentence token that the model has never seen.
    """
    with_special, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    begin: int | None = with_special[0] if with_special[:1] != plain[:1] else tokenizer.eos_token_id
    return begin


@torch.no_grad()
def score_documents(
    model: Any,
    documents: Sequence[Document],
    *,
    window: int,
    stride: int,
    begin: int | None,
    batch_size: int = 8,
    progress_seconds: float = 5.0,
) -> Scores:
    """Score each document; see `mone_eval.windows.cut`.

    model: a causal language model of transformers in evaluation mode. batch_size: full windows of a batch. The result does
    not depend on it. Raises UserError if no token can be scored, or a loss is not finite.
    """
    windows = cut(documents, window=window, stride=stride, begin=begin)
    if not windows:
        raise UserError("text: has too little text: no token can be scored")
    number_of = {id(each): number for number, each in enumerate(windows)}
    sums_W = torch.zeros(len(windows), dtype=torch.float64)
    read = sum(map(len, windows))
    began = logged = time.monotonic()
    done = 0
    for batch in group(windows, tokens=_batch_tokens(model, window, batch_size)):
        sums_B = _score_batch(model, batch, documents, begin)
        sums_W[[number_of[id(each)] for each in batch]] = sums_B
        done += sum(map(len, batch))
        if time.monotonic() - logged >= progress_seconds:
            logged = time.monotonic()
            rate = done / (logged - began)
            logger.info(f"text: {done / read:.0%}, {rate:,.0f} tokens/s read, {clock((read - done) / rate)} left")
    if not sums_W.isfinite().all():
        document = documents[windows[int((~sums_W.isfinite()).nonzero()[0])].document]
        raise UserError(f"text: the loss of {document.name} is not finite; if the weights are, try dtype=float32")
    nll_N, tokens_N = sum_by_document(windows, sums_W, documents=len(documents))
    return Scores(nll_N, tokens_N, read, time.monotonic() - began)


def _batch_tokens(model: Any, window: int, batch_size: int) -> int:
    fitting = LOGITS_BYTES // (model.config.get_text_config().vocab_size * model.dtype.itemsize)
    return max(window, min(batch_size * window, fitting))


def _score_batch(model: Any, batch: Sequence[Window], documents: Sequence[Document], begin: int | None) -> torch.Tensor:
    """Summed negative log-likelihood of each window [B], float64."""
    inputs_BT, targets_BT = (tensor.to(model.device) for tensor in collate(batch, documents, begin=begin))
    first = min(each.scored_from - each.start - 1 for each in batch)
    some = {"logits_to_keep": inputs_BT.size(1) - first} if first and _keeps_some_logits(model) else {}
    logits_BTV = model(input_ids=inputs_BT, use_cache=False, **some).logits
    targets_BT = targets_BT[:, -logits_BTV.size(1) :]
    sums_B = [nll(logits_TV, targets_T) for logits_TV, targets_T in zip(logits_BTV, targets_BT, strict=True)]
    return torch.stack(sums_B).cpu()


def nll(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood of the targets that are not IGNORED, float64; computed in fp32, some rows at a time."""
    rows = max(1, ROWS_NUMBERS // logits_TV.size(1))
    total = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
    for logits_PV, targets_P in zip(logits_TV.split(rows), targets_T.split(rows), strict=True):
        losses_P = F.cross_entropy(logits_PV.float(), targets_P, ignore_index=IGNORED, reduction="none")
        total += losses_P.double().sum()
    return total


def _keeps_some_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
