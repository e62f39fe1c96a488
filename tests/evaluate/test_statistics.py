"""The interval and the p value against computations that share no code with them."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from reranker.evaluate.statistics import difference


def enumerated_p(changes: list[float]) -> float:
    """The share of all combinations of signs whose sum is as far from 0 as that of the changes."""
    observed = abs(math.fsum(changes))
    sums = [
        abs(math.fsum(s * c for s, c in zip(signs, changes, strict=True)))
        for signs in product((1, -1), repeat=len(changes))
    ]
    return sum(total >= observed - 1e-12 for total in sums) / len(sums)


@pytest.mark.parametrize("count", [2, 3, 7, 12])
@pytest.mark.parametrize("zeros", [0, 1, 4])
def test_the_p_value_of_few_queries_is_that_of_all_signs(count: int, zeros: int) -> None:
    rng = random.Random(count)
    changes = [rng.uniform(-0.4, 0.6) for _ in range(count)] + [0.0] * zeros
    base = [rng.random() for _ in changes]
    found = difference(base, [b + c for b, c in zip(base, changes, strict=True)])
    assert found.p == pytest.approx(enumerated_p(changes), abs=1e-12)
    assert found.mean == pytest.approx(math.fsum(changes) / len(changes))
    assert (found.better, found.equal, found.worse) == (
        sum(c > 0 for c in changes),
        zeros,
        sum(c < 0 for c in changes),
    )


def test_the_p_value_of_many_queries_is_that_of_the_binomial_distribution() -> None:
    """Changes of one size: the number of positive signs is binomial, so the exact p value is a sum."""
    better, worse = 39, 21
    found = difference([0.5] * 100, [0.6] * better + [0.4] * worse + [0.5] * 40)
    total = better + worse
    exact = 2 * sum(math.comb(total, k) for k in range(better, total + 1)) / 2**total
    assert found.p is not None
    deviation = math.sqrt(exact * (1 - exact) / 10_000)
    assert abs(found.p - exact) < 5 * deviation
    assert 0.02 < exact < 0.05  # so that a one-sided p, or that of another statistic, fails


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_of_few_queries_is_that_of_all_resamples(count: int) -> None:
    """Between percentiles of all n**n resamples that 10,000 random ones cannot miss by chance."""
    rng = random.Random(count)
    changes = [round(rng.uniform(-1, 1), 3) for _ in range(count)]
    means = sorted(math.fsum(sample) / count for sample in product(changes, repeat=count))
    found = difference([0.0] * count, changes)
    slack = 0.005  # of 10,000 resamples: 3 deviations at the percentile 2.5
    for value, share in ((found.low, 0.025), (found.high, 0.975)):
        low = means[math.floor(len(means) * (share - slack))]
        high = means[min(len(means) - 1, math.ceil(len(means) * (share + slack)))]
        assert value is not None
        assert low - 1e-9 <= value <= high + 1e-9


def test_the_interval_of_many_queries_is_that_of_the_normal_distribution() -> None:
    rng = random.Random(5)
    changes = [rng.gauss(0.02, 0.2) for _ in range(2000)]
    found = difference([0.0] * len(changes), changes)
    mean = math.fsum(changes) / len(changes)
    error = math.sqrt(math.fsum((c - mean) ** 2 for c in changes)) / len(changes)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_the_interval_covers_the_truth_and_the_p_value_is_uniform_where_nothing_differs() -> None:
    """Of 300 experiments without a difference about 5 % have an interval without 0, and 5 % a p below 0.05."""
    rng = random.Random(11)
    found = [difference([0.0] * 40, [rng.gauss(0, 1) for _ in range(40)], resamples=500) for _ in range(300)]
    outside = sum(not (f.low or 0) <= 0 <= (f.high or 0) for f in found)
    low_p = sum((f.p or 0) < 0.05 for f in found)
    assert 4 <= outside <= 36  # 5 deviations around 15, and the interval of 40 queries is a little too narrow
    assert 2 <= low_p <= 34


def test_the_same_input_gives_the_same_output_and_the_order_of_systems_only_the_sign() -> None:
    rng = random.Random(2)
    a, b = ([rng.random() for _ in range(80)] for _ in range(2))
    found, other = difference(a, b), difference(b, a)
    assert difference(a, b) == found
    assert other.mean == pytest.approx(-found.mean)
    assert (other.better, other.worse) == (found.worse, found.better)
    assert other.p == pytest.approx(found.p, abs=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("a", "b", "low", "high", "p"),
    [
        ([0.5], [0.7], None, None, None),
        ([0.5, 0.5], [0.5, 0.5], 0.0, 0.0, 1.0),
        ([0.1 + 0.2, 1.0], [0.3, 1.0], 0.0, 0.0, 1.0),
        ([0.0] * 4, [0.0, 0.0, 0.0, 1.0], 0.0, 0.75, 1.0),
        ([0.0] * 3, [1.0] * 3, 1.0, 1.0, 0.25),
    ],
)
def test_where_there_is_little_to_compare(
    a: list[float], b: list[float], low: float | None, high: float | None, p: float | None
) -> None:
    found = difference(a, b)
    assert (found.low, found.high, found.p) == (low, high, p)
