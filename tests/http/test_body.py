"""Bodies of every kind to every dialect of a real server: valid ones are ranked, all others refused in one shape.

tests/http/test_openapi.py generates bodies from the OpenAPI document; these tests also know the meaning of a request,
and check that no error echoes it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reranker.engine.scores import sigmoid
from reranker.http.body import exceeds_values
from reranker.http.dialects import ROUTES
from reranker.request.fields import FIELDS
from tests.conftest import Server
from tests.fake import PREFIX
from tests.http.test_rerank import ALL, ranked

MARK = "zebra7"
"""In every string of a request; in no error response."""
KEYS = tuple(FIELDS)
TEXT = st.text(st.characters(exclude_categories=()), max_size=12).map(lambda text: MARK + text)
NUMBER = st.integers() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXT | st.sampled_from(["text", *KEYS]), inner, max_size=3)
    ),
    max_leaves=8,
)
DOCUMENT = TEXT | st.just("") | st.fixed_dictionaries({"text": TEXT}, optional={"id": NUMBER, MARK: JSON})
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "query": TEXT,
    "documents": st.lists(DOCUMENT, min_size=1, max_size=5),
    "texts": st.lists(DOCUMENT, min_size=1, max_size=5),
    "model": TEXT,
    "instruction": TEXT | st.just(""),
    "instruct": TEXT | st.none(),
    **dict.fromkeys(
        ["top_k", "top_n", "max_tokens_per_doc", "max_chunks_per_doc", "max_chunk_per_doc"],
        st.integers(1, 10**20) | st.integers(1, 99).map(str) | st.sampled_from([None, "", 2.0]),
    ),
    **dict.fromkeys(
        ["return_documents", "return_text", "raw_scores", "use_activation"],
        st.sampled_from([True, False, "true", "0", "", None]),
    ),
    "rank_fields": st.sampled_from([["text"], [], None]),
    "truncate": st.booleans(),
}


def near() -> st.SearchStrategy[dict[str, Any]]:
    """Requests with some valid and some arbitrary fields."""
    return st.fixed_dictionaries({}, optional={key: RIGHT[key] | JSON for key in KEYS} | {MARK: JSON})


def send(server: Server, path: str, body: object) -> tuple[int, Any, bytes]:
    content = json.dumps(body).encode()
    answer = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    return answer.status_code, answer.json(), answer.content


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from(ALL), body=near() | JSON)
def test_any_json_is_ranked_or_refused_without_an_echo(fake_server: Server, path: str, body: object) -> None:
    status, content, raw = send(fake_server, path, body)
    if status == 200:
        assert isinstance(body, dict)
        count = len(body["documents" if body.get("texts") is None else "texts"])
        assert {i for i, _ in ranked(content)} <= set(range(count))
    else:
        assert status == 422
        assert set(content) == {"detail", "error_type", "message", "error"}
        assert isinstance(content["detail"], str)
        assert content["error_type"] == "invalid_request"
        assert len(raw) < 2048
        assert MARK not in raw.decode()


@settings(max_examples=250, deadline=None)
@given(
    path=st.sampled_from(ALL),
    body=st.fixed_dictionaries(
        {"query": RIGHT["query"]}, optional={k: v for k, v in RIGHT.items() if k not in KEYS[:3]}
    ),
    name=st.sampled_from(["documents", "texts"]),
    documents=RIGHT["documents"],
    data=st.data(),
)
def test_a_right_request_is_ranked_in_its_dialect(
    fake_server: Server, path: str, body: dict[str, Any], name: str, documents: list[Any], data: st.DataObject
) -> None:
    words = data.draw(st.lists(st.sampled_from("red green blue".split()), min_size=1, max_size=3, unique=True))
    body |= {"query": " ".join(words), name: documents}
    documents += data.draw(st.lists(st.sampled_from(["red", "green blue", "red green blue", "none"]), max_size=3))
    status, content, _ = send(fake_server, path, body)
    assert status == 200, content
    # The scorer of tests/fake.py counts the words that a document shares with the query.
    texts = [document if isinstance(document, str) else document["text"] for document in documents]
    assert len(words) < PREFIX
    logits = [len(set(words) & set(text.split())) for text in texts]
    limit = int(body.get("top_k") or body.get("top_n") or len(texts))
    best = sorted(range(len(texts)), key=lambda i: (-logits[i], i))[:limit]
    logits_wanted = body.get("raw_scores") in (True, "true") or body.get("use_activation") in (False, "0")
    score = float if logits_wanted else sigmoid
    assert [i for i, _ in ranked(content)] == best
    assert [s for _, s in ranked(content)] == pytest.approx([score(logits[i]) for i in best])
    array = name == "texts" or (path == "/v1/rerank" and "model" not in body)
    assert isinstance(content, list) == array
    if not array:
        about = {"results", "id", "model", "usage", "meta"}
        assert set(content) == ({"results"} if path == "/api/v1/rerank" and "model" not in body else about)


@pytest.mark.parametrize("path", ALL)
def test_the_mark_is_in_answers_that_rank(fake_server: Server, path: str) -> None:
    """Otherwise its absence in errors would prove nothing."""
    _, _, raw = send(fake_server, path, {"query": MARK, "documents": [MARK], "return_documents": True})
    assert MARK in raw.decode()


def values(of: Any) -> int:
    """Count the values of a JSON value, itself included, names of fields excluded."""
    if isinstance(of, dict):
        return 1 + sum(map(values, of.values()))
    return 1 + sum(map(values, of)) if isinstance(of, list) else 1


NESTED = st.recursive(
    st.none() | st.integers() | st.text(alphabet='a",[]{}\\:/\n压', max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='b,"\\', max_size=3), inner),
)


@given(NESTED, st.sampled_from([None, 1]))
def test_values_are_counted_as_they_are(of: object, indent: int | None) -> None:
    separators = None if indent else (",", ":")
    content = json.dumps(of, indent=indent, separators=separators, ensure_ascii=False).encode()
    assert not exceeds_values(content, values(of))
    assert exceeds_values(content, values(of) - 1) or values(of) == 1


def test_values_are_counted_across_pieces() -> None:
    for count in (10_000, 60_001):
        texts = json.dumps([f'"{i},[' * 3 for i in range(count)]).encode()
        assert [exceeds_values(texts, count + 1), exceeds_values(texts, count)] == [False, True]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('{"query": "a", "documents": ["b"], "query": "a"}', "query"),
        ('{"query": "a", "documents": ["b"], "documents": null}', "documents"),
        ('{"query": "a", "documents": [{"text": "b", "id": 1, "text": "c"}]}', "text"),
        ('{"query": "a", "documents": ["b"], "x": {"deep": [{"y": 1, "y": 1}]}}', "y"),
        ('{"query": "a", "documents": ["b"], "\\u0071uery": "c"}', "query"),
        ('{"query": "a", "documents": ["b"], "a\\n b": 1, "a\\n b": 1}', "a__b"),
    ],
)
def test_a_name_that_is_twice_in_one_object_is_refused(fake_server: Server, content: str, name: str) -> None:
    for route in ROUTES:
        response = fake_server.client.post(route.path, content=content)
        assert response.status_code == 422
        assert response.json()["detail"] == f"{name}: is in one JSON object twice; send it once"


def test_the_search_for_the_doubled_name_is_linear(fake_server: Server) -> None:
    names = ", ".join(f'"n{i}": 0' for i in range(200_000))
    response = fake_server.client.post("/v1/rerank", content=f'{{{names}, "n199999": 1}}')
    assert response.json()["detail"] == "n199999: is in one JSON object twice; send it once"
