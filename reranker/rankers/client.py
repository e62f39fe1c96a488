"""Scores from a running service: POST /v1/rerank in its native shape.

Over the standard library, which follows HTTPS_PROXY and NO_PROXY: a client package would be one more pin for one POST,
and a new connection for each costs little beside the scoring.
"""

from __future__ import annotations

import email.utils
import http.client
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
from typing import Any

from reranker import __version__
from reranker.errors import FailedError, InvalidRequestError, RerankError
from reranker.notes import Notes
from reranker.rankers.ranker import Scored
from reranker.terminal import note
from reranker.types import RerankRequest

# Enough to fill the service's next batch while it computes this one; more would only fill its queue.
_CONNECTIONS = 4
# A request is sent in parts: a service may allow fewer documents or bytes than one request here has.
_PART_DOCUMENTS = 256
_PART_CHARACTERS = 1_000_000
_SOCKET_SECONDS = 150
"""Above the service's own deadline (REQUEST_TIMEOUT, 100 s), so that its 504 is heard."""
_LONGEST_WAIT = 60.0
_PLACE = re.compile(r"^documents\[(\d+)\]")
_BUSY = {429: "busy", 502: "behind a proxy without it", 503: "not ready", 504: "too slow"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following would turn the POST into a GET and hand the token to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Never."""


class Client:
    """A service at an address.

    Args:
        url: scheme, host and port, and a path if it is served under one.
        token: sent as a bearer token.
        patience: seconds that one request may wait for a busy or restarting service.

    Raises:
        FailedError: nothing answers there.
    """

    def __init__(self, url: str, token: str | None = None, *, patience: float = 300.0) -> None:
        self.url = url
        self.patience = patience
        self._headers = {"Content-Type": "application/json", "User-Agent": f"reranker/{__version__}"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._told = False
        self._notes = Notes(note)  # which makes a server's text harmless
        self._lock = threading.Lock()
        self._open("/livez", None).close()

    @property
    def facts(self) -> dict[str, str]:
        """See `Ranker.facts`."""
        return {"url": self.url}

    def rank_many(self, requests: Iterable[RerankRequest]) -> Iterator[Scored | RerankError]:
        """See `Ranker.rank_many`. A few requests are on their way at a time, and answered in order."""
        sent: deque[Future[Scored | RerankError]] = deque()
        closing = threading.Event()
        pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="client")
        try:
            for request in requests:
                sent.append(pool.submit(self._rank, request, closing))
                if len(sent) > _CONNECTIONS:
                    yield sent.popleft().result()
            while sent:
                yield sent.popleft().result()
        finally:  # where it is left early, nobody reads the rest: it must not hold an interruption up
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
        """Scores in the order of the documents; waits politely while the service is busy.

        Raises:
            InvalidRequestError: the service refuses this request.
            FailedError: it refuses all, or its patience ran out.
        """
        data = json.dumps(body).encode()
        deadline = time.monotonic() + self.patience
        for attempt in range(1 << 30):
            try:
                with self._open("/v1/rerank", data) as response:
                    rows, headers = json.load(response), response.headers
                scores = {row["index"]: float(row["score"]) for row in rows}
                truncated = int(headers.get("x-truncated-documents", 0))
                self._note(headers.get("x-warnings", ""))
                documents = range(len(body["documents"]))
                return Scored([scores[i] for i in documents], truncated, "x-truncated-query" in headers)
            except urllib.error.HTTPError as error:
                wait, why = self._refused(error), f"{_BUSY.get(error.code)} ({error.code})"
            except (KeyError, TypeError, ValueError):
                raise FailedError(f"{self.url} does not answer like this service; check --url") from None
            except (OSError, http.client.HTTPException) as error:  # it answered before: probably it restarts
                wait, why = None, f"gone ({_reason(error)})"
            pause = min(_LONGEST_WAIT, wait if wait is not None else 0.5 * 2 ** min(attempt, 7))
            pause += random.uniform(0, pause / 4)  # several clients must not come back at the same moment
            if time.monotonic() + pause > deadline:
                raise FailedError(f"{self.url} is {why}, for {self.patience:g} s now; try again later")
            if not self._told:
                self._told = True
                note(f"{self.url} is {why}; waiting up to {self.patience:g} s")
            if closing.wait(pause):
                raise FailedError("interrupted")
        raise AssertionError("unreachable")

    def _note(self, warnings: str) -> None:
        """Print the service's warnings, except those about truncation, which are counted with the scores."""
        with self._lock:
            texts = (text for text in warnings.split(" | ") if text and "did not fit" not in text)
            self._notes.add(texts, f"{self.url}: ")

    def _refused(self, error: urllib.error.HTTPError) -> float | None:
        """Seconds to wait by a busy service's own word.

        Raises:
            InvalidRequestError: this request will never do.
            FailedError: no request will.
        """
        with error:
            detail = _detail(error)
        if error.code in _BUSY:
            return _retry_after(error.headers.get("Retry-After"))
        if error.code in (401, 403):
            raise FailedError(f"{self.url} refuses the token: {detail}; set --token or ACCESS_TOKEN")
        if error.code in (400, 413, 422):
            raise InvalidRequestError(detail)
        base = "; --url is the base address, without /v1/rerank" if error.code in (404, 405) else ""
        raise FailedError(f"{self.url} answers {error.code}: {detail}{base}")

    def _open(self, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            return self._opener.open(request, timeout=_SOCKET_SECONDS if data else 20)
        except urllib.error.HTTPError as error:
            if data:
                raise
            return error  # whatever it is, something answers
        except (OSError, http.client.HTTPException) as error:
            if data:
                raise
            raise FailedError(f"cannot reach {self.url}: {_reason(error)}; is the service running?") from None


def _body(request: RerankRequest, documents: list[str]) -> dict[str, Any]:
    """The JSON body of a request, with some of its documents; options with their default value are left out."""
    options = {
        "instruction": request.instruction,
        "max_tokens_per_doc": request.max_tokens_per_doc,
        "max_chunks_per_doc": request.max_chunks_per_doc,
        "truncate": False if not request.truncate else True if request.truncate_query else None,
    }
    body = {"query": request.query, "documents": documents}
    return body | {name: value for name, value in options.items() if value is not None}


def _parts(documents: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    characters = 0
    for document in documents:
        if part and (len(part) == _PART_DOCUMENTS or characters + len(document) > _PART_CHARACTERS):
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
    """The service's own words, else the status's."""
    try:
        detail = json.load(error)["detail"]
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return str(error.reason)
    return " ".join(str(detail).split())[:500]


def _retry_after(value: str | None) -> float | None:
    """Seconds, from either form of the header."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
