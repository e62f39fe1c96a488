"""The compute threads: they load the scorer, then run its forward passes, each within a timeout.

Python cannot stop a hung thread, so every timeout here is fatal: the worker exits.
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


class LanesLike(Protocol):
    """The part of a scorer's Lanes that the service uses."""

    on_idle: Callable[[], None]

    @property
    def idle(self) -> bool:
        """Whether a lane has nothing to do."""


class ScorerLike(Protocol):
    """The part of a Scorer that the service uses; `encode` and `pack` run in other threads, beside `score`."""

    max_batch_tokens: int
    max_batch_documents: int

    @property
    def lanes(self) -> LanesLike | None:
        """With lanes, which are not all busy at the end of a pass, two passes may run at a time; None: one."""

    @property
    def info(self) -> ModelInfo:
        """The model and the options chosen for it."""

    @property
    def memory(self) -> int:
        """Bytes of device memory held by this process."""

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Tokenise a request."""

    def pack(self, slices: Sequence[Slice]) -> Any:
        """Lay slices out for one forward pass, in a form that only `score` reads."""

    def score(self, batch: Any) -> list[float]:
        """Return the logits of the batch's documents."""


def catch_panics(function: Callable[P, T]) -> Callable[P, T]:
    """Turn a panic of the tokenizer into a RuntimeError.

    A panic is a BaseException, so it would pass every `except Exception` and look like a cancellation or an exit.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return call


class ComputeThread:
    """Loads a scorer and scores with it; a second thread is used while a pass runs in the first.

    Args:
        load: makes the scorer, within `load_timeout` seconds.
        pass_timeout: max seconds of a forward pass; above every request's timeout, so a longer pass only blocks.
    """

    def __init__(self, load: Callable[[], ScorerLike], *, load_timeout: float, pass_timeout: float) -> None:
        self._load = load
        self._load_timeout = load_timeout
        self._pass_timeout = pass_timeout
        # Two pools, not one of two threads: a device whose passes run one at a time must see a single thread.
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("device", "device-2")]
        self._busy = [False, False]
        self._hangs = False

    async def load(self) -> ScorerLike:
        """Load the scorer; raises TimeoutError after `load_timeout`, and any error of `load`."""
        text = f"the model was not loaded within LOAD_TIMEOUT={self._load_timeout:g} s"
        return await self._run(0, self._load_timeout, lambda: TimeoutError(text), self._load)

    async def score(self, scorer: ScorerLike, slices: Sequence[Slice], packed: Any) -> list[float]:
        """Return the logits of the slices' documents; `packed` is the result of `pack`, or None to pack here.

        Raises DeviceLostError if the device is lost or a forward pass hangs, and any error of the scorer.
        """
        if self._hangs:  # a batch packed during the hung pass would wait for the timeout again
            raise self._lost()
        return await self._run(int(self._busy[0]), self._pass_timeout, self._lost, _score, scorer, slices, packed)

    def close(self) -> None:
        """Start no further work; a running pass is abandoned."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def _lost(self) -> DeviceLostError:
        text = f"a forward pass did not end within {self._pass_timeout:g} s and the worker restarts; try again"
        return DeviceLostError(text, retry_after=10)

    async def _run(
        self, thread: int, seconds: float, error: Callable[[], Exception], function: Callable[..., T], *args: Any
    ) -> T:
        """Call a function in a thread; raise `error()` if it does not return within `seconds`."""
        work = asyncio.get_running_loop().run_in_executor(self._pools[thread], catch_panics(function), *args)
        self._busy[thread] = True
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError:
            if not work.cancelled():
                raise  # of the function itself: of a download, for example
            self._hangs = True
            raise error() from None
        finally:
            self._busy[thread] = False


def _score(scorer: ScorerLike, slices: Sequence[Slice], packed: Any) -> list[float]:
    return scorer.score(scorer.pack(slices) if packed is None else packed)
