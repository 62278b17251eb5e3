"""Windows and intervals, against brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_eval.documents import Document
from mone_eval.intervals import paired_difference, ratio_interval, score_text
from mone_eval.windows import IGNORED, collate, cut, group, sum_by_document

BEGIN = 10**6
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=8)


def documents_of(lengths: list[int]) -> list[Document]:
    """Documents whose tokens are all different."""
    first = np.cumsum([0, *lengths])
    return [
        Document(str(number), torch.arange(first[number], first[number] + length), length, "")
        for number, length in enumerate(lengths)
    ]


@settings(deadline=None, max_examples=200)
@given(lengths=LENGTHS, window=st.integers(1, 16), stride=st.integers(1, 16), begin=st.booleans(), tokens=st.integers(1, 60))
def test_each_token_is_scored_once_with_enough_context(
    lengths: list[int], window: int, stride: int, begin: bool, tokens: int
) -> None:
    stride = min(stride, window)
    documents, beginning = documents_of(lengths), BEGIN if begin else None
    context: dict[int, list[int]] = {}
    windows = cut(documents, window=window, stride=stride, begin=beginning)
    batches = list(group(windows, tokens=tokens))
    assert sorted(map(id, windows)) == sorted(id(each) for batch in batches for each in batch)
    for batch in batches:
        inputs_BT, targets_BT = collate(batch, documents, begin=beginning)
        assert inputs_BT.size(1) <= window
        assert len(batch) == 1 or inputs_BT.numel() <= tokens
        for row, its in enumerate(batch):
            assert int((targets_BT[row] != IGNORED).sum()) == its.num_scored
            for place in (targets_BT[row] != IGNORED).nonzero().flatten().tolist():
                target = int(targets_BT[row, place])
                assert target not in context, "scored twice"
                context[target] = inputs_BT[row, : place + 1].tolist()
    expected: dict[int, list[int]] = {}
    for document in documents:
        whole = ([BEGIN] if begin else []) + document.tokens.tolist()
        expected |= {whole[place]: whole[:place] for place in range(1, len(whole))}
    assert context.keys() == expected.keys()
    for token, found in context.items():
        assert found == expected[token][-len(found) :]
        assert len(found) >= min(window - stride + 1, len(expected[token]))


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_sums_by_document(lengths: list[int]) -> None:
    documents = documents_of(lengths)
    windows = cut(documents, window=7, stride=3, begin=BEGIN)
    sums_W = torch.tensor([float(sum(range(each.scored_from, each.stop + 1))) for each in windows])
    nll_N, tokens_N = sum_by_document(windows, sums_W, documents=len(lengths))
    assert nll_N.tolist() == [length * (length + 1) / 2 for length in lengths]
    assert tokens_N.tolist() == lengths


def test_an_interval_is_that_of_resampled_documents() -> None:
    random = np.random.default_rng(1)
    sizes_N = random.integers(1, 50, 40)
    sums_N = sizes_N * random.normal(3.0, 0.5, 40)
    found = ratio_interval(sums_N, sizes_N, resamples=4000)
    drawn = [random.integers(0, 40, 40) for _ in range(4000)]
    low, high = np.quantile([sums_N[rows].sum() / sizes_N[rows].sum() for rows in drawn], [0.025, 0.975])
    assert found.value == pytest.approx(sums_N.sum() / sizes_N.sum())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert found == ratio_interval(sums_N, sizes_N, resamples=4000)


def test_scores_and_differences_of_a_text() -> None:
    nll_N, tokens_N, bytes_N = [6.0, 2.0], [3, 1], [8, 4]
    score = score_text(nll_N, tokens_N, bytes_N)
    assert score.nll_per_token.value == 2.0
    assert score.nll_per_token.low == score.nll_per_token.high == 2.0  # both documents have the same ratio
    assert score.perplexity.value == pytest.approx(math.exp(2))
    assert score.bits_per_byte.value == pytest.approx(8 / 12 / math.log(2))
    # Documents of equal difference: the interval of a pair has no width, however much the documents differ.
    difference = paired_difference([10.0, 100.0], [10.5, 100.5], [5, 5])
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert score_text([6.0], [3], [8]).bits_per_byte.low is None
