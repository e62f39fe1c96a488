"""The difference of two systems on the same queries, and whether it is more than chance.

By scipy, which ir-measures' trec_eval brings along: its bootstrap and its permutation test are reviewed and vectorised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
FEW_QUERIES = 20
"""Below it the bootstrap interval is too narrow."""
_TINY = 1e-9
"""A smaller change of a measure is rounding."""
_VALUES = 2_000_000
"""Numbers of resamples in memory at a time: 16 MB."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The change of a measure per query, from one system to another."""

    mean: float
    low: float | None
    """Ends of the bootstrap interval of the mean (`CONFIDENCE`, percentiles); None: fewer than two queries."""
    high: float | None
    p: float | None
    """Two-sided p value of the paired randomisation test: how often random signs give a mean as far from 0."""
    better: int
    equal: int
    worse: int


def difference(reference: Sequence[float], values: Sequence[float], *, resamples: int = RESAMPLES) -> Difference:
    """Compare the values of the same queries in the same order; the same input always gives the same output.

    The randomisation test takes all combinations of signs where these are at most `resamples`, else `resamples` random
    ones and the observed one (Phipson and Smyth 2010), so that p is never 0.
    """
    exact = [value - base for base, value in zip(reference, values, strict=True)]
    changes = [change if abs(change) > _TINY else 0.0 for change in exact]
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    counts = (better, len(changes) - better - worse, worse)
    mean = sum(changes) / len(changes)
    if len(changes) < 2:
        return Difference(mean, None, None, None, *counts)
    if not better and not worse:
        return Difference(0.0, 0.0, 0.0, 1.0, *counts)
    return Difference(mean, *_interval(changes, resamples), _p(changes, resamples), *counts)


def _interval(changes: Sequence[float], resamples: int) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(changes),),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _VALUES // len(changes)),
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",  # BCa has no value where nearly all changes are 0
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _p(changes: Sequence[float], resamples: int) -> float:
    import numpy as np
    from scipy.stats import permutation_test

    # A sign changes nothing at 0, so the test of the others is the same one, and exact for more queries.
    signed = np.asarray([change for change in changes if change])
    if len(signed) == 1:
        return 1.0
    found = permutation_test(
        (signed,),
        np.sum,
        permutation_type="samples",  # of a single sample: signs
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _VALUES // len(signed)),
        rng=np.random.default_rng(SEED),
    )
    return min(1.0, float(found.pvalue))
