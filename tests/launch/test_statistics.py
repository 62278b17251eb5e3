"""Statistics of paired differences against published numbers and exact cases."""

import math

import numpy as np
import pytest

from launch.statistics import bootstrap, contrast, holm, saved_tokens, slope

SLEEP = (1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4)
"""Extra hours of sleep by patient, of two drugs (Student 1908); R's t.test gives the numbers below."""


def test_the_interval_and_p_value_of_students_sleep_data() -> None:
    found = contrast(SLEEP, margin=0.5)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found.p == pytest.approx(0.00283289, abs=1e-7)
    assert not found.equivalent
    assert contrast([-value for value in SLEEP], margin=0.5).p == pytest.approx(found.p)


def test_equivalence_holds_if_the_90_percent_interval_is_within_the_margin() -> None:
    # The interval of a test at 5 % on each side: mean ± 2.1318 standard errors with 4 degrees of freedom.
    values = np.array([0.010, 0.014, 0.006, 0.012, 0.008])
    end = values.mean() + 2.131847 * values.std(ddof=1) / math.sqrt(5)
    assert contrast(values.tolist(), margin=end + 1e-4).equivalent
    assert not contrast(values.tolist(), margin=end - 1e-4).equivalent
    assert contrast(values.tolist(), margin=end).p_equivalent == pytest.approx(0.05, abs=1e-4)


def test_too_few_pairs_give_no_interval_and_equal_ones_no_width() -> None:
    assert math.isnan(contrast([], margin=0.1).mean)
    assert contrast([0.2], margin=0.1).mean == 0.2
    assert math.isnan(contrast([0.2], margin=0.1).p)
    assert not contrast([0.2], margin=0.1).equivalent
    same = contrast([0.05, 0.05], margin=0.1)
    assert (same.low, same.high, same.p, same.equivalent) == (0.05, 0.05, 0.0, True)
    assert not contrast([0.2, 0.2], margin=0.1).equivalent


def test_holms_correction() -> None:
    # R: p.adjust(c(0.03, 0.01, 0.04, 0.02), "holm")
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    corrected = holm([math.nan, 0.01])
    assert math.isnan(corrected[0])
    assert corrected[1] == 0.01


def test_the_bootstrap_varies_seeds_and_documents() -> None:
    random = np.random.default_rng(1)
    tokens_N = random.integers(50, 500, 200)
    base_SN = random.normal(4, 0.5, (5, 200)) * tokens_N
    low, high = bootstrap(base_SN + 0.02 * tokens_N, base_SN, tokens_N)
    assert (low, high) == pytest.approx((0.02, 0.02)), "all documents and seeds differ by 0.02 nats per token"
    for of_seeds in ([0.01, 0.02, 0.03], [0.01, 0.02, 0.025, 0.025], [0.01, 0.02, 0.03, 0.02, 0.02]):
        of_seeds_S1 = np.array(of_seeds)[:, None]
        low, high = bootstrap(base_SN[: len(of_seeds)] + of_seeds_S1 * tokens_N, base_SN[: len(of_seeds)], tokens_N)
        width, of_t = high - low, contrast(of_seeds, margin=1.0)
        assert width == pytest.approx(of_t.high - of_t.low, rel=0.15)
        assert low < 0.02 < high
    of_documents_N = random.normal(0, 0.3, 200)
    low, high = bootstrap(base_SN + (of_seeds_S1 + of_documents_N) * tokens_N, base_SN, tokens_N)
    assert high - low > 2 * width


def test_tokens_saved_follow_the_slope() -> None:
    tokens = np.linspace(1e5, 1e6, 50)
    b = slope(tokens.tolist(), (9 - 0.3 * np.log(tokens)).tolist())
    assert b == pytest.approx(0.3)
    assert saved_tokens(-0.3 * math.log(2), b) == pytest.approx(0.5), "the baseline would need twice as many"
    assert saved_tokens(0.0, b) == 0
    assert saved_tokens(0.3 * math.log(2), b) == pytest.approx(-1), "the baseline needs half as many"
    assert math.isnan(saved_tokens(0.1, -0.2))
    assert saved_tokens(0.3 * math.log(9.9), b) == pytest.approx(-8.9)
    assert math.isnan(saved_tokens(0.3 * math.log(10.1), b))
    assert math.isnan(saved_tokens(1.0, 1e-9))
    assert math.isnan(slope([1.0], [2.0]))
