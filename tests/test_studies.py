"""Every study can be imported, and the simulator agrees with queueing theory."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from studies.arrivals import Arrival, arrival
from studies.routing import round_robin
from studies.simulate import simulate
from studies.simulated import Speed
from tests.conftest import ROOT

SERVICE_SECONDS = 0.1


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "studies").glob("[a-z]*.py")))
def test_a_study_can_be_imported(name: str) -> None:
    if name == "cluster":
        pytest.importorskip("ray", reason="needs the environment of `make test-ray`")
    importlib.import_module(f"studies.{name}")


def poisson(utilisation: float, size: Callable[[np.random.Generator], int]) -> Iterator[Arrival]:
    """Requests of one document, which take `SERVICE_SECONDS` on average."""
    rng = np.random.default_rng(3)
    now = 0.0
    while True:
        now += rng.exponential(SERVICE_SECONDS / utilisation)
        yield arrival(now, 0, 1, [size(rng)])


def test_fixed_service_times_wait_as_long_as_in_an_m_d_1_queue() -> None:
    speed = Speed(rate=1000, overhead=0.0, budget=100)
    requests = itertools.islice(poisson(0.8, lambda rng: 99), 20_000)
    outcome = simulate(requests, round_robin(), 1, speed, warm_up=1000)
    wait = SERVICE_SECONDS * 0.8 / (2 * (1 - 0.8))  # Pollaczek and Khinchine
    assert outcome.seconds.mean() == pytest.approx(SERVICE_SECONDS + wait, rel=0.05)
    assert outcome.utilisation == pytest.approx(0.8, rel=0.02)
    assert outcome.passes == 20_000, "one request fills a pass"


def test_exponential_service_times_wait_as_long_as_in_an_m_m_1_queue() -> None:
    speed = Speed(rate=1000, overhead=0.0, budget=1)  # every document is a pass of its own, whatever its length
    requests = itertools.islice(poisson(0.7, lambda rng: max(1, int(rng.exponential(100)))), 20_000)
    outcome = simulate(requests, round_robin(), 1, speed, warm_up=1000)
    assert outcome.seconds.mean() == pytest.approx(SERVICE_SECONDS / (1 - 0.7), rel=0.08)
    assert np.percentile(outcome.seconds, 99) == pytest.approx(SERVICE_SECONDS / (1 - 0.7) * np.log(100), rel=0.1)
