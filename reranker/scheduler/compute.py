"""The one thread that computes: it loads the scorer, then runs its forward passes, each within its time.

A thread that hangs cannot be ended, only left behind with its process; so every time that runs out is an error for
which the worker ends.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, Protocol, TypeVar

from reranker.errors import DeviceLostError
from reranker.types import EncodedRequest, ModelInfo, RerankRequest, Slice

P = ParamSpec("P")
T = TypeVar("T")


class ScorerLike(Protocol):
    """What the service needs of a Scorer; `encode` and `pack` run beside `score`, in other threads.

    What `pack` returns is the scorer's own affair.
    """

    max_batch_tokens: int
    max_batch_documents: int

    @property
    def info(self) -> ModelInfo:
        """What was loaded and chosen."""

    @property
    def memory(self) -> int:
        """Bytes of the device's memory that this process holds."""

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Texts to tokens."""

    def pack(self, slices: Sequence[Slice]) -> Any:
        """Lay slices out for one forward pass."""

    def score(self, batch: Any) -> list[float]:
        """Logits of the batch's documents."""


def catch_panics(function: Callable[P, T]) -> Callable[P, T]:
    """The same for a thread: a panic of the tokenizer, which is no Exception, is one. Nobody could tell it from a
    cancellation or an exit, and it would pass all who deal with errors.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception:  # goes on as it is
            raise
        except BaseException as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return call


class ComputeThread:
    """Loads and scores.

    Args:
        load: makes the scorer.
        load_timeout: seconds that it may take.
        pass_timeout: seconds that a forward pass may take. One that takes longer than any request waits serves nobody,
            and holds up everybody.
    """

    def __init__(self, load: Callable[[], ScorerLike], *, load_timeout: float, pass_timeout: float) -> None:
        self._load = load
        self.load_timeout = load_timeout
        self.pass_timeout = pass_timeout
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._hangs = False

    async def load(self) -> ScorerLike:
        """The scorer.

        Raises:
            TimeoutError: not loaded in time.
            Exception: whatever a checkpoint can break.
        """
        work = asyncio.get_running_loop().run_in_executor(self._pool, catch_panics(self._load))
        try:
            return await asyncio.wait_for(work, self.load_timeout)
        except TimeoutError:
            if not work.cancelled():
                raise  # its own: of a download, for one
            raise TimeoutError(f"the model was not loaded within LOAD_TIMEOUT={self.load_timeout:g} s") from None

    async def score(self, scorer: ScorerLike, slices: Sequence[Slice], packed: Any) -> list[float]:
        """Logits of the slices' documents; `packed`: what `pack` made of them, or None where it was not called yet.

        Raises:
            DeviceLostError: the device is lost, or the forward pass hangs.
            Exception: the scorer's.
        """
        if not self._hangs:  # else a batch that was packed meanwhile would wait as long again
            work = asyncio.get_running_loop().run_in_executor(self._pool, _score, scorer, slices, packed)
            try:
                return await asyncio.wait_for(work, self.pass_timeout)
            except TimeoutError:
                if not work.cancelled():
                    raise
                self._hangs = True
        raise DeviceLostError(
            f"a forward pass did not end within {self.pass_timeout:g} s and the worker restarts; try again",
            retry_after=10,
        )

    def close(self) -> None:
        """Start nothing more; what runs is left behind."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@catch_panics
def _score(scorer: ScorerLike, slices: Sequence[Slice], packed: Any) -> list[float]:
    return scorer.score(scorer.pack(slices) if packed is None else packed)
