"""Measure at load, and choose from it: accelerated paths, lanes, token budget.

Everything is measured with real forward passes on this device, small ones first.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from reranker.engine import device as devices
from reranker.engine.acceleration import accelerate
from reranker.engine.budget import MIN_BATCH_TOKENS
from reranker.engine.lanes import MIN_TOKENS, Lanes
from reranker.engine.precision import QUANTIZED, between
from reranker.errors import ScoringError
from reranker.types import RerankRequest, Slice

if TYPE_CHECKING:
    from reranker.engine.scorer import Batch, Scorer

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Target duration of a batch: a longer one makes small requests wait, a shorter one wastes launches.
BATCH_SECONDS = 0.5
MAX_BATCH_TOKENS = 262_144
_MEMORY_SHARE = 0.8
"""Share of the free memory that a batch may take by the estimate."""
# Of LOAD_TIMEOUT: 300 of 1800 s. A compilation took 14 to 19 s on two quiet cores, and 59 s on two busy ones.
_COMPILER_SHARE = 1 / 6
# Where one pass of the lanes' batch takes longer, only one lane per core is tried.
_SLOW_SECONDS = 5.0
# Lanes are used, and doubled, only if a batch takes at most this share of the time.
_MAX_LANE_TIME = 0.97
# A comparison of lanes may take so long for three turns: on a fast machine one takes 0.4 s.
_TURNS_SECONDS = 3.0
_DOCUMENT = "The warm-up document says nothing of interest, but it has about as many words as a short passage. " * 2


@dataclass(frozen=True, slots=True)
class Rate:
    """Speed and memory of a forward pass."""

    tokens_per_second: float
    bytes_per_token: float


def warm_up(scorer: Scorer, load_timeout: float = 1800.0) -> Rate:
    """Cache the static prefix, set up accelerated paths and lanes; return the best rate.

    Args:
        scorer: the loaded model.
        load_timeout: seconds of the whole load; a share of them is the compiler's limit.

    Raises:
        ScoringError: a score is not finite, or the precision is not implemented on this device.
    """
    model = scorer.model
    measure(scorer, warm_up_batch(scorer, 1))  # the eager path must work before another one is compared with it
    if model.backbone.causal and scorer.prompt.static_prefix:
        model.cache_prefix(scorer.prompt.static_prefix)
    accelerate(model, load_timeout * _COMPILER_SHARE)
    documents, rate = _measure_growing(scorer)
    return choose_lanes(scorer, documents, rate) if model.device.type == "cpu" else rate


def _measure_growing(scorer: Scorer) -> tuple[int, Rate]:
    """Return the documents of the largest batch measured, and the best rate.

    A 4B model on a laptop needs seconds for 128 tokens; a GPU is not busy below a few thousand.
    """
    best = Rate(0.0, 0.0)
    for documents in (1, 8, 64):
        batch = warm_up_batch(scorer, documents)
        rates = _repeat(partial(measure, scorer, batch), 2 * BATCH_SECONDS, at_least=2)  # the first pass is cold
        speed = max(rate.tokens_per_second for rate in rates)
        best = Rate(max(best.tokens_per_second, speed), rates[-1].bytes_per_token)
        if batch.tokens / speed > BATCH_SECONDS / 2:
            break
    return documents, best


def _repeat(work: Callable[[], T], seconds: float, at_least: int = 1) -> list[T]:
    """Do work up to three times while `seconds` are not over, because another process may delay it."""
    results, start = list[T](), time.perf_counter()
    while len(results) < at_least or (len(results) < 3 and time.perf_counter() - start < seconds):
        results.append(work())
    return results


def by_turns(scorer: Scorer, documents: int, ways: Sequence[Lanes | None]) -> list[float]:
    """Seconds of a batch with each of the lanes, the shortest of up to three turns: what delays one delays all."""

    def turn() -> list[float]:
        seconds = []
        for scorer.lanes in ways:
            batch = warm_up_batch(scorer, documents)
            seconds.append(batch.tokens / measure(scorer, batch).tokens_per_second)
        return seconds

    return list(map(min, zip(*_repeat(turn, _TURNS_SECONDS), strict=True)))


def warm_up_batch(scorer: Scorer, documents: int) -> Batch:
    """Return a batch of one request with equal documents, packed for the scorer's current lanes."""
    return scorer.pack([Slice(scorer.encode(RerankRequest("warm-up", [_DOCUMENT] * documents)), 0, documents)])


def measure(scorer: Scorer, batch: Batch) -> Rate:
    """Score a batch once.

    Raises:
        ScoringError: see `warm_up`.
    """
    model, before = scorer.model, 0
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
    start = time.perf_counter()
    try:
        logits = scorer.score(batch)
    except RuntimeError as error:
        raise ScoringError(f"warm-up failed: {str(error).splitlines()[0]}") from error
    seconds = time.perf_counter() - start
    if not all(map(math.isfinite, logits)):
        raise ScoringError("a warm-up score is not a number")
    width = model.backbone.activation_width
    dtype = QUANTIZED.get(model.dtype, between(model.dtype, model.device))
    bytes_per_token = float(width * dtype.itemsize)
    if model.device.type == "cuda":  # a recorded pass allocates nothing, so the estimate is the lower bound
        measured = (torch.cuda.max_memory_allocated(model.device) - before) / batch.tokens
        bytes_per_token = max(bytes_per_token, measured)
    return Rate(batch.tokens / seconds, bytes_per_token)


def choose_lanes(scorer: Scorer, documents: int, rate: Rate) -> Rate:
    """Set `scorer.lanes` to the fastest number of lanes, if they are faster than one pass; return the best rate."""
    cores = torch.get_num_threads()
    if cores == 1:
        return rate
    document_tokens = warm_up_batch(scorer, 2).tokens - warm_up_batch(scorer, 1).tokens
    few = max(2 * cores, -(-cores * MIN_TOKENS // document_tokens))  # enough for all lanes
    powers: set[int] = set()
    if few * document_tokens / rate.tokens_per_second < _SLOW_SECONDS:
        few, powers = 2 * few, {2**i for i in range(1, cores.bit_length()) if 2**i < cores}
    tokens = warm_up_batch(scorer, few).tokens
    one_pass = best = tokens / rate.tokens_per_second
    for count in sorted(powers | {cores}):
        previous, lanes = scorer.lanes, Lanes(count, cores)
        before, seconds = by_turns(scorer, few, [previous, lanes])
        one_pass = one_pass if previous else before
        faster = seconds < before * _MAX_LANE_TIME
        scorer.lanes, unused, best = (lanes, previous, seconds) if faster else (previous, lanes, before)
        if unused is not None:
            unused.close()
        if not faster:
            break
    logger.info(
        "lanes: %s (%d cores; warm-up ran %.0f tokens/s in one pass with all cores, %.0f with these lanes)",
        scorer.lanes.count if scorer.lanes else "none, one pass with all cores",
        cores,
        tokens / one_pass,
        tokens / best,
    )
    if scorer.lanes and documents > few:  # parts of a full pass are larger, and faster
        tokens, best = warm_up_batch(scorer, documents).tokens, by_turns(scorer, documents, [scorer.lanes])[0]
    return Rate(max(rate.tokens_per_second, tokens / best), rate.bytes_per_token)


def choose_budget(rate: Rate, memory: devices.Memory, requested: int | None, passes: int = 1) -> int:
    """Return the tokens of a forward pass, of which `passes` may run at a time, and log the reason."""
    by_memory = int(memory.available * _MEMORY_SHARE / rate.bytes_per_token / passes)
    by_speed = int(rate.tokens_per_second * BATCH_SECONDS)
    budget = requested or max(MIN_BATCH_TOKENS, min(by_memory, by_speed, MAX_BATCH_TOKENS))
    logger.info(
        "token budget: %d per forward pass (%s; warm-up ran %.0f tokens/s, so %.1f s of work are %d tokens; memory "
        "holds %d at %.0f KiB per token, %s)",
        budget,
        "requested" if requested else "chosen",
        rate.tokens_per_second,
        BATCH_SECONDS,
        by_speed,
        by_memory,
        rate.bytes_per_token / 1024,
        memory,
    )
    return budget
