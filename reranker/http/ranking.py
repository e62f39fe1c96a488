"""The scored and sorted result of a request, and the response headers that every dialect shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reranker.engine.scores import sigmoid
from reranker.request.parse import ParsedRequest
from reranker.types import ModelInfo, RerankResult


@dataclass(frozen=True, slots=True)
class Ranking:
    """Everything that a dialect needs to render a response."""

    parsed: ParsedRequest
    result: RerankResult
    best: list[tuple[int, float]]
    """(document index, score), best first, at most `limit`; the score is a probability, or the logit on request."""
    model: ModelInfo
    request_id: str

    @classmethod
    def of(cls, parsed: ParsedRequest, result: RerankResult, model: ModelInfo, request_id: str) -> Ranking:
        """Sort the scores of a request."""
        score = float if parsed.raw_scores else sigmoid
        logits = result.logits if parsed.by_query else of_equals(parsed.request.documents, result.logits)
        best = [(i, score(logits[i])) for i in order(logits, parsed.limit)]
        return cls(parsed, result, best, model, request_id)

    @property
    def warnings(self) -> list[str]:
        """Sentences about unread fields and truncated texts."""
        warnings = list(self.parsed.warnings)
        if self._instruction_unread:
            warnings.append("instruction is not read: the prompt of the served model has none")
        if self.result.query_truncated:
            more = "a larger MAX_SEQ_LENGTH, where the model allows it, reads more of it"
            warnings.append(f"the query did not fit and was truncated; {more}")
        if self.result.truncated_documents:
            warnings.append(
                f"{self.result.truncated_documents} of {len(self.parsed.request.documents)} documents did not fit and "
                f"were truncated; a larger max_chunks_per_doc scores more of them"
            )
        return warnings

    @property
    def _instruction_unread(self) -> bool:
        return bool(self.parsed.request.instruction) and not self.model.reads_instruction

    @property
    def headers(self) -> dict[str, str]:
        """Response headers; times in milliseconds."""
        times = self.result.timings
        headers = {
            "x-prompt-tokens": str(self.result.prompt_tokens),
            "x-truncated-documents": str(self.result.truncated_documents),
            "x-tokenization-time": f"{times.tokenization * 1000:.1f}",
            "x-queue-time": f"{times.queue * 1000:.1f}",
            "x-inference-time": f"{times.inference * 1000:.1f}",
            "x-total-time": f"{times.total * 1000:.1f}",
        }
        if ignored := [*self.parsed.ignored, *(["instruction"] if self._instruction_unread else [])]:
            headers["x-ignored-fields"] = ", ".join(ignored)
        if self.result.query_truncated:
            headers["x-truncated-query"] = "true"
        if warnings := self.warnings:
            headers["x-warnings"] = " | ".join(warnings)
        return headers


HEADERS: dict[str, dict[str, object]] = {
    name: {"description": text, "schema": {"type": kind}}
    for name, text, kind in (
        ("x-request-id", "Echo of the request's header, or a new id", "string"),
        ("traceparent", "Echo of a valid header of the request; otherwise absent", "string"),
        ("x-prompt-tokens", "Tokens of all prompts, as the model reads them", "integer"),
        ("x-truncated-documents", "Number of documents that did not fit and were truncated", "integer"),
        ("x-tokenization-time", "Milliseconds", "number"),
        ("x-queue-time", "Milliseconds", "number"),
        ("x-inference-time", "Milliseconds", "number"),
        ("x-total-time", "Milliseconds", "number"),
        ("x-ignored-fields", "Names of unread fields, comma-separated; absent if there are none", "string"),
        ("x-truncated-query", "`true` if the query did not fit and was truncated; otherwise absent", "string"),
        ("x-warnings", "The texts of `meta.warnings`, joined with ` | `; absent if there are none", "string"),
    )
}
"""OpenAPI's description of the headers."""


def of_equals(documents: Sequence[str], logits: Sequence[float]) -> list[float]:
    """Return logits that are equal for equal documents: that of the first of them.

    A kernel's last bits may depend on a document's place in the batch, and would order equal documents by it.
    """
    first: dict[str, float] = {}
    return [first.setdefault(document, logit) for document, logit in zip(documents, logits, strict=True)]


def order(logits: Sequence[float], limit: int | None) -> list[int]:
    """Return document indices, best first, ties by index; at most `limit` of them, all if it is None."""
    return sorted(range(len(logits)), key=logits.__getitem__, reverse=True)[:limit]  # sorted() is stable
