"""Scores from a running service: POST /v1/rerank in its native dialect.

Over the standard library, which follows HTTPS_PROXY and NO_PROXY: a client package would be one more pin for one POST,
and a new connection for each costs little beside the scoring.
"""

from __future__ import annotations

import email.utils
import http.client
import itertools
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from reranker import __version__
from reranker.errors import FailedError, InvalidRequestError, RerankError
from reranker.notes import Notes
from reranker.rankers.ranker import Scored
from reranker.terminal import note
from reranker.types import RerankRequest

CONNECTIONS = 4
"""Enough to fill the service's next batch while it computes one; more would only fill its queue."""
MAX_PART_DOCUMENTS = 256
MAX_PART_CHARACTERS = 1_000_000
"""A request is sent in parts, because a service may allow fewer documents or bytes in one."""
CONNECT_TIMEOUT = 20.0
RESPONSE_TIMEOUT = 150.0
"""Seconds; above the service's own deadline (REQUEST_TIMEOUT, 100 s), so that its 504 arrives."""
MAX_PAUSE = 60.0
_PLACE = re.compile(r"^documents\[(\d+)\]")
_BUSY = {429: "busy", 502: "behind a proxy without it", 503: "not ready", 504: "too slow"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following a redirect would turn the POST into a GET and send the token to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow no redirect."""


class Client:
    """A service at a URL, which may have a path prefix, with its bearer token.

    One request waits at most `max_wait` seconds for a busy or restarting service; at most `connections` are in flight.

    Raises:
        FailedError: nothing responds there.
    """

    def __init__(
        self, url: str, token: str | None = None, *, max_wait: float = 300.0, connections: int = CONNECTIONS
    ) -> None:
        self.url = url
        self.max_wait = max_wait
        self.connections = connections
        self._headers = {"Content-Type": "application/json", "User-Agent": f"reranker/{__version__}"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._notes = Notes(note)  # `note` removes control characters from the server's texts
        self._lock = threading.Lock()
        try:
            self._open("/livez").close()
        except urllib.error.HTTPError as error:  # any response will do
            error.close()
        except (OSError, ValueError, http.client.HTTPException) as error:  # a ValueError: not a URL
            raise FailedError(f"cannot reach {url}: {_reason(error)}; is the service running?") from None

    @property
    def facts(self) -> dict[str, str]:
        """See `Ranker.facts`; with the model's name, if the service tells it."""
        try:
            with self._open("/info") as response:
                model = json.load(response)["model_id"]
        except (OSError, http.client.HTTPException, KeyError, TypeError, ValueError):
            return {"url": self.url}
        return {"url": self.url, "model": str(model)}

    def rank_many(self, requests: Iterable[RerankRequest]) -> Iterator[Scored | RerankError]:
        """See `Ranker.rank_many`. A few requests are in flight at a time, and yielded in order."""
        pending: deque[Future[Scored | RerankError]] = deque()
        closing = threading.Event()
        pool = ThreadPoolExecutor(self.connections, thread_name_prefix="client")
        try:
            for request in requests:
                pending.append(pool.submit(self._rank, request, closing))
                if len(pending) > self.connections:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # a caller that stops early does not wait for the rest
            closing.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _rank(self, request: RerankRequest, closing: threading.Event) -> Scored | RerankError:
        scores: list[float] = []
        truncated, query_truncated = 0, False
        try:
            for documents in _parts(request.documents):
                part = self._post(_body(request, documents), closing)
                scores += part.scores
                truncated += part.truncated
                query_truncated |= part.query_truncated
        except InvalidRequestError as error:  # its index counts from the start of the part
            return InvalidRequestError(_PLACE.sub(lambda m: f"documents[{int(m[1]) + len(scores)}]", str(error)))
        except RerankError as error:
            return error
        return Scored(scores, truncated, query_truncated)

    def _post(self, body: dict[str, Any], closing: threading.Event) -> Scored:
        """Return scores in the order of the documents; retries for `max_wait` seconds while the service is busy."""
        data = json.dumps(body).encode()
        deadline = time.monotonic() + self.max_wait
        for attempt in itertools.count():
            try:
                return self._score(data, len(body["documents"]))
            except urllib.error.HTTPError as error:
                wait, state = self._retry_after(error), f"{_BUSY.get(error.code)} ({error.code})"
            except (KeyError, TypeError, ValueError):
                raise FailedError(f"{self.url} does not answer like this service; check --url") from None
            except (OSError, http.client.HTTPException) as error:  # it responded before, so it probably restarts
                wait, state = None, f"gone ({_reason(error)})"
            pause = min(MAX_PAUSE, 0.5 * 2 ** min(attempt, 7) if wait is None else wait)
            pause += random.uniform(0, pause / 4)  # several clients must not return at the same moment
            if time.monotonic() + pause > deadline:
                raise FailedError(f"{self.url} is {state}, for {self.max_wait:g} s now; try again later")
            self._note(f"{self.url} is {state}; waiting up to {self.max_wait:g} s")
            if closing.wait(pause):
                break
        raise FailedError("interrupted")

    def _score(self, data: bytes, count: int) -> Scored:
        with self._open("/v1/rerank", data) as response:
            rows, headers = json.load(response), response.headers
        scores = {row["index"]: float(row["score"]) for row in rows}
        warnings = (text for text in headers.get("x-warnings", "").split(" | ") if text)
        # Truncation is counted with the scores.
        self._note(*(f"{self.url}: {text}" for text in warnings if "did not fit" not in text))
        truncated = int(headers.get("x-truncated-documents", 0))
        return Scored([scores[i] for i in range(count)], truncated, "x-truncated-query" in headers)

    def _note(self, *texts: str) -> None:
        with self._lock:
            self._notes.add(texts)

    def _retry_after(self, error: urllib.error.HTTPError) -> float | None:
        """Return the seconds that a busy service asks to wait, or None; raise the error that any other response is."""
        with error:
            detail = _detail(error)
        if error.code in _BUSY:
            return _seconds(error.headers.get("Retry-After"))
        if error.code in (401, 403):
            raise FailedError(f"{self.url} refuses the token: {detail}; set --token or ACCESS_TOKEN")
        if error.code in (400, 413, 422):
            raise InvalidRequestError(detail)
        base = "; --url is the base address, without /v1/rerank" if error.code in (404, 405) else ""
        raise FailedError(f"{self.url} answers {error.code}: {detail}{base}")

    def _open(self, path: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(self.url + path, data, self._headers)
        return self._opener.open(request, timeout=RESPONSE_TIMEOUT if data else CONNECT_TIMEOUT)


def _body(request: RerankRequest, documents: list[str]) -> dict[str, Any]:
    """Return the JSON body of a request with some of its documents, without options that have their default."""
    body = {
        "query": request.query,
        "documents": documents,
        "instruction": request.instruction,
        "max_tokens_per_doc": request.max_tokens_per_doc,
        "max_chunks_per_doc": request.max_chunks_per_doc,
        "truncate": False if not request.truncate else True if request.truncate_query else None,
    }
    return {name: value for name, value in body.items() if value is not None}


def _parts(documents: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    characters = 0
    for document in documents:
        if part and (len(part) == MAX_PART_DOCUMENTS or characters + len(document) > MAX_PART_CHARACTERS):
            yield part
            part, characters = [], 0
        part.append(document)
        characters += len(document)
    if part:
        yield part


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or inner or type(error).__name__)


def _detail(error: urllib.error.HTTPError) -> str:
    """Return the error text of the service, else the reason phrase."""
    try:
        detail = json.load(error)["detail"]
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return str(error.reason)
    return " ".join(str(detail).split())[:500]


def _seconds(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header in either form."""
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None
