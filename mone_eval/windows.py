"""Cuts documents into windows that a model reads, so that each token is predicted once with enough context.

    windows = cut(documents, window=2048, stride=1024, begin=tokenizer.eos_token_id)
    for batch in group(windows, tokens=8 * 2048):
        inputs_BT, targets_BT = collate(batch, documents, begin=tokenizer.eos_token_id)
        sums_B = ...                        # sum of the losses of each row where targets_BT != IGNORED
    nll_N, tokens_N = sum_by_document(...)

Legend: B windows of a batch, T tokens of the longest of them, N documents.

Padding follows the tokens of a row, and a causal model does not look ahead. So padding changes no prediction, and no
attention mask is needed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mone_eval.documents import Document

IGNORED = -100
"""Target of a prediction that is not scored, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop - 1` of a document are read; tokens `start + 1` to `stop` are predicted.

    With a beginning-of-document token, that is token 0, and the text begins at token 1.
    """

    document: int
    """Number of the document, from 0."""
    start: int
    """First token that is read."""
    stop: int
    """The token after the last one that is read; the last one that is predicted."""
    scored_from: int
    """First predicted token that counts; those before it are context, and count in an earlier window."""

    def __len__(self) -> int:
        """Number of tokens that the model reads."""
        return self.stop - self.start

    @property
    def num_scored(self) -> int:
        """Number of predictions that count."""
        return self.stop + 1 - self.scored_from


def cut(documents: Sequence[Document], *, window: int, stride: int, begin: int | None) -> list[Window]:
    """The windows of all documents, in order.

    window: largest number of tokens that the model reads at a time. stride: distance between the starts of two windows,
    1 to `window`. begin: beginning-of-document token; None: the first token of a document is context only.

    Each other token is scored exactly once. It has at least `window - stride + 1` tokens of context, or all tokens before
    it.
    """
    return [
        Window(number, *place)
        for number, document in enumerate(documents)
        for place in _places(len(document.tokens) + (begin is not None), window, stride)
    ]


def _places(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start, stop and first scored token of each window of `length` tokens."""
    scored_from = 1
    for start in range(0, max(length - 1, 0), stride):
        stop = min(start + window, length - 1)
        yield start, stop, scored_from
        if stop == length - 1:
            return
        scored_from = stop + 1


def group(windows: Iterable[Window], *, tokens: int) -> Iterator[list[Window]]:
    """Batches of windows of similar length, the longest first.

    tokens: largest size of a batch, rows times the longest row; a window that is longer is a batch of its own.
    """
    batch: list[Window] = []
    for window in sorted(windows, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def collate(
    batch: Sequence[Window], documents: Sequence[Document], *, begin: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """inputs_BT and targets_BT, both int64; a target is IGNORED where nothing is scored."""
    longest = max(map(len, batch))
    inputs_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets_BT = torch.full_like(inputs_BT, IGNORED)
    shift = int(begin is not None)
    for row, window in enumerate(batch):
        tokens = documents[window.document].tokens[max(window.start - shift, 0) : window.stop + 1 - shift]
        if begin is not None and window.start == 0:
            tokens = torch.cat([torch.tensor([begin]), tokens])
        inputs_BT[row, : len(window)] = tokens[:-1]
        skipped = window.scored_from - window.start - 1
        targets_BT[row, skipped : len(window)] = tokens[1 + skipped :]
    return inputs_BT, targets_BT


def sum_by_document(windows: Sequence[Window], sums_W: torch.Tensor, *, documents: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed losses [N] float64 and numbers of scored tokens [N] int64 of each document.

    sums_W: sum of the scored losses of each window, in the order of `windows`.
    """
    numbers_W = torch.tensor([window.document for window in windows], dtype=torch.int64)
    nll_N = torch.zeros(documents, dtype=torch.float64).index_add_(0, numbers_W, sums_W.double())
    scored_W = torch.tensor([window.num_scored for window in windows], dtype=torch.int64)
    return nll_N, torch.zeros(documents, dtype=torch.int64).index_add_(0, numbers_W, scored_W)
