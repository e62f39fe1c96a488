"""Which documents meet which query, and what is reported; tests/http/test_dialect_score.py has the errors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker.errors import InvalidRequestError
from reranker.request.pairs import NOT_READ, SHAPES, parse_pairs
from reranker.request.parse import parse_request
from reranker.types import RerankRequest
from tests.request.bodies import wear

WORDS = st.sampled_from(["red", "fish", "a bird"])


def pairs_of(requests: tuple[RerankRequest, ...]) -> dict[int, tuple[str, str]]:
    return {
        request.position(i): (request.query, document)
        for request in requests
        for i, document in enumerate(request.documents)
    }


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12), st.sampled_from(SHAPES))
def test_every_document_is_in_the_request_of_its_query_once(
    pairs: list[tuple[str, str]], shape: tuple[str, str]
) -> None:
    body = {shape[0]: [query for query, _ in pairs], shape[1]: [document for _, document in pairs]}
    parsed = parse_pairs(body)
    requests = parsed.by_query or (parsed.request,)
    assert pairs_of(requests) == dict(enumerate(pairs))
    assert len({request.query for request in requests}) == len(requests)
    assert list(parsed.request.documents) == body[shape[1]]


def test_one_query_is_one_request_and_its_options_are_those_of_a_rerank_request() -> None:
    options = {
        "instruct": "find",
        "max_tokens_per_doc": "5",
        "max_chunks_per_doc": 3,
        "truncate": True,
        "use_activation": False,
        "model": "m",
    }
    parsed = parse_pairs({"queries": "q", "documents": ["a", "b"], **options})
    expected = parse_request({"query": "q", "documents": ["a", "b"], **options})
    assert parsed.by_query == ()
    assert parsed.request.only([0, 1]) == expected.request.only([0, 1])
    assert (parsed.raw_scores, parsed.has_model, parsed.limit) == (True, True, None)
    for request in parse_pairs({"queries": ["q", "r"], "documents": ["a", "b"], **options}).by_query:
        assert (request.instruction, request.max_tokens_per_doc, request.max_chunks_per_doc) == ("find", 5, 3)
        assert request.truncate_query


def test_the_first_shape_is_read_and_the_others_are_reported() -> None:
    body = {"text_1": "t", "text_2": "u", "queries": "q", "items": ["a"], "data_1": "x"}
    parsed = parse_pairs(body)
    assert (parsed.request.query, list(parsed.request.documents)) == ("q", ["a"])
    assert parsed.ignored == ("text_1", "text_2", "data_1")


@pytest.mark.parametrize("name", NOT_READ)
def test_fields_without_a_meaning_are_reported_whatever_their_value(name: str) -> None:
    for value in (1, "x", ["y"], -1):
        parsed = parse_pairs({"text_1": "q", "text_2": ["a", "b"], name: value})
        assert parsed.ignored == (name,)
        assert parsed.warnings == (f"{name} is not read here",)
    assert parse_pairs({"text_1": "q", "text_2": ["a", "b"], name: None}).ignored == ()


def test_the_template_is_taken_off_the_pairs_that_wear_it() -> None:
    worn = wear("red fish", ["a fish"], "find")
    queries, documents = [worn["query"], "bare"], [worn["documents"][0], "a bird"]
    for order in (1, -1):
        parsed = parse_pairs({"queries": queries[::order], "documents": documents[::order]})
        by_query = {request.query: request for request in parsed.by_query}
        assert (by_query["red fish"].documents, by_query["red fish"].instruction) == (["a fish"], "find")
        assert (by_query["bare"].documents, by_query["bare"].instruction) == (["a bird"], None)
        assert len(parsed.warnings) == 1
        assert parsed.warnings[0].startswith("queries: Qwen's prompt template was taken off")


def test_a_wrong_field_is_named_as_in_the_body() -> None:
    bodies: list[tuple[dict[str, Any], str]] = [
        ({"text_1": ["a", ""], "text_2": ["a", "b"]}, "text_1[1]: must not be empty"),
        ({"data_1": "", "data_2": ["a"]}, "data_1: must not be empty"),
        ({"queries": "q", "items": [{"id": 1}]}, "items[0]: must be a string"),
    ]
    for body, start in bodies:
        with pytest.raises(InvalidRequestError) as caught:
            parse_pairs(body)
        assert str(caught.value).startswith(start)
