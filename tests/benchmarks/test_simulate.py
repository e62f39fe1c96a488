"""benchmarks/simulate.py against queueing theory, and its promises: every request ends, no pass above the budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from benchmarks.routing import Choose, Loads, by_prefix, least, round_robin, stale, two_choices
from benchmarks.simulate import POLICIES, Outcome, rate_for, simulate
from benchmarks.simulated import Speed
from benchmarks.traffic import Arrival, arrival, from_files, heavy_tailed, workloads

ONE = Speed(rate=1000, overhead=0.0, budget=100)


def poisson(utilisation: float, size: Callable[[np.random.Generator], int]) -> Iterator[Arrival]:
    """Requests of one document to `ONE`, which needs 0.1 s for the mean one."""
    rng = np.random.default_rng(3)
    now = 0.0
    while True:
        now += rng.exponential(0.1 / utilisation)
        yield arrival(now, 0, 1, [size(rng)])


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_fixed_service_times_wait_as_long_as_in_an_m_d_1_queue(utilisation: float) -> None:
    requests = itertools.islice(poisson(utilisation, lambda rng: 99), 40_000)
    outcome = simulate(requests, round_robin(), 1, ONE, warm_up=2000)
    wait = 0.1 * utilisation / (2 * (1 - utilisation))  # Pollaczek and Khinchine
    assert outcome.seconds.mean() == pytest.approx(0.1 + wait, rel=0.05)
    assert outcome.utilisation == pytest.approx(utilisation, rel=0.02)
    assert outcome.passes == 40_000, "one request fills a pass"


def test_exponential_service_times_wait_as_long_as_in_an_m_m_1_queue() -> None:
    # A budget of one token: every document is a pass of its own, however long.
    speed = Speed(rate=1000, overhead=0.0, budget=1)
    requests = itertools.islice(poisson(0.7, lambda rng: max(1, int(rng.exponential(100)))), 60_000)
    outcome = simulate(requests, round_robin(), 1, speed, warm_up=2000)
    assert outcome.seconds.mean() == pytest.approx(0.1 / (1 - 0.7), rel=0.08)
    assert np.percentile(outcome.seconds, 99) == pytest.approx(0.1 / (1 - 0.7) * np.log(100), rel=0.1)


def test_every_request_ends_and_no_pass_is_above_the_budget() -> None:
    speed = Speed(rate=54_000, overhead=0.01, budget=5000)
    arrivals = list(itertools.islice(heavy_tailed(30, 5), 2000))
    outcome = simulate(arrivals, round_robin(), 8, speed)
    assert len(outcome.seconds) == 2000
    alone = np.array([a.tokens for a in arrivals]) / speed.rate + speed.overhead
    assert (outcome.seconds >= alone - 1e-9).all()
    assert max(a.tokens for a in arrivals) > 10 * speed.budget, "some must be cut"
    assert 0 < outcome.most <= speed.budget
    # Time is spent on every token once, on a prefix once a slice, and on every pass.
    device = (outcome.busy - outcome.passes * speed.overhead) * speed.rate
    tokens = sum(a.tokens for a in arrivals)
    assert tokens <= device < 1.05 * tokens


@pytest.mark.parametrize(("comes", "passes"), [(0.01, 1), (0.06, 2)], ids=["early in a pass", "late in a pass"])
def test_a_small_request_overtakes_a_huge_one(comes: float, passes: int) -> None:
    speed = Speed(rate=1000, overhead=0.0, budget=100)
    huge, small = arrival(0.0, 0, 10, [9] * 1000), arrival(comes, 1, 10, [40])
    outcome = simulate([huge, small], round_robin(), 1, speed)
    # Behind the pass that runs, and the next one if that was taken already, when half of the running one was over. Half
    # of a pass is for small ones: it shares 96 tokens.
    assert outcome.seconds[1] == pytest.approx(passes * 0.1 + 0.096 - comes)
    assert outcome.seconds[0] > 9


def test_what_waits_shares_a_pass() -> None:
    speed = Speed(rate=1000, overhead=0.5, budget=1000)
    outcome = simulate([arrival(0.01 * i, i, 10, [40]) for i in range(6)], round_robin(), 1, speed)
    assert outcome.passes == 2
    assert outcome.seconds[1:] + 0.01 * np.arange(1, 6) == pytest.approx(0.55 + 0.75)


def test_a_remembered_prefix_costs_nothing_the_second_time() -> None:
    arrivals = [arrival(float(i), i // 2, 50, [50]) for i in range(4)]
    busy = [simulate(arrivals, round_robin(), 1, ONE, remember=remember).busy for remember in (False, True)]
    assert busy == pytest.approx([0.4, 0.3])


# Policies


def loads(*tokens: int) -> Loads:
    made = Loads(len(tokens))
    made.tokens[:] = tokens
    made.requests[:] = [1 if n else 0 for n in tokens]
    return made


def test_policies_choose() -> None:
    some = [arrival(float(i), query, 10, [90]) for i, query in enumerate([7, 7, 8, 9, 10, 11])]
    turns = round_robin()
    assert [turns(a, loads(0, 0, 0)) for a in some[:4]] == [0, 1, 2, 0]
    assert least("tokens", 1)(some[0], loads(300, 200, 100, 400)) == 2
    assert least("requests", 1)(some[0], loads(300, 0, 100)) == 1
    assert {least("tokens", seed)(some[0], loads(5, 0, 0)) for seed in range(20)} == {1, 2}, "ties at random"
    assert {two_choices("tokens", seed)(some[0], loads(9, 1)) for seed in range(40)} == {0, 1}
    prefix = by_prefix()
    assert prefix(some[0], loads(*[0] * 50)) == prefix(some[1], loads(*[900] * 50)), "one query, one GPU"
    assert len({prefix(a, loads(*[0] * 50)) for a in some}) == 5
    home = prefix(some[0], loads(*[0] * 50))
    full = loads(*[0] * 50)
    full.tokens[home] = 1000
    assert by_prefix(1.25)(some[0], full) == (home + 1) % 50


def test_stale_figures_stand_still() -> None:
    late = stale(least("tokens", 1), 1.0)
    seen = loads(100, 0)
    assert late(arrival(0.0, 0, 10, [90]), seen) == 1
    seen.tokens[:] = [0, 900]
    assert late(arrival(0.5, 0, 10, [90]), seen) == 1
    assert late(arrival(1.5, 0, 10, [90]), seen) == 0


def test_fewest_tokens_beats_random_and_prefixes_gain_less_than_they_cost() -> None:
    speed = Speed()
    rate = rate_for(0.8, 20, speed, 1)

    def run(name: str) -> Outcome:
        requests = itertools.islice(heavy_tailed(rate, 1), 2000)
        return simulate(requests, POLICIES[name](), 20, speed, warm_up=200, remember="ideal cache" in name)

    random, tokens = run("random"), run("fewest tokens")
    assert tokens.p(99) < random.p(99)
    assert tokens.p(50) < random.p(50) / 2
    assert run("by prefix, at most 1.25, ideal cache").p(50) > tokens.p(50)


# Traffic


def test_traffic_is_the_same_for_everybody_and_heavy_tailed() -> None:
    first, second = (list(itertools.islice(heavy_tailed(100, 9), 5000)) for _ in range(2))
    assert [(a.at, a.query, a.tokens) for a in first] == [(a.at, a.query, a.tokens) for a in second]
    assert first[-1].at == pytest.approx(50, rel=0.1)
    counts = np.array([len(a.request.documents) for a in first])
    assert np.median(counts) == pytest.approx(30, rel=0.1)
    assert counts.max() > 1000
    assert all(a.tokens == a.request.tokens for a in first[:100])


def test_the_workloads_are_those_that_were_counted() -> None:
    short = workloads()["short"]
    assert (short.prompt_tokens, short.tokens, short.count) == (81_348, 51_213, 400)
    sizes = {a.tokens for a in itertools.islice(from_files(1, 1), 200)}
    whole = {p + sum(d) for w in workloads().values() for p, d in zip(w.prefixes, w.documents, strict=True)}
    assert sizes == whole


def test_policies_are_made_fresh() -> None:
    made: list[Choose] = [make() for make in POLICIES.values()]
    assert len({id(choose) for choose in made}) == len(made)
