from __future__ import annotations

import pytest

from reranker.errors import InvalidRequestError
from reranker.request.names import naming, parse_as, renamed
from reranker.request.unread import MAX_NAMES

NAMES = {"documents": "passages", "top_k": "parameters.top_k"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("documents[3]: must be a string", "passages[3]: must be a string"),
        ("documents: is required", "passages: is required"),
        ("query: send documents", "query: send documents"),
        ('query: is required; "docs" is not read, did you mean documents?', None),
        ("topk is not read; did you mean top_k?", "topk is not read; did you mean parameters.top_k?"),
        ("documents.title", "passages.title"),
        ("the documents did not fit", "the documents did not fit"),
    ],
)
def test_the_name_of_the_field_is_the_clients(text: str, expected: str | None) -> None:
    assert renamed(text, NAMES) == (expected or text.replace("documents", "passages"))


def test_errors_of_fields_have_the_clients_names_and_no_cause() -> None:
    with pytest.raises(InvalidRequestError, match=r"passages\[0\]") as caught, naming(NAMES):
        raise InvalidRequestError("documents[0]: x")
    assert caught.value.__suppress_context__


def test_a_mapped_body_is_reported_in_the_clients_names() -> None:
    body = {"query": "q", "documents": [{"text": "a", "title": "t"}], "topk": 1}
    parsed = parse_as(NAMES, body, {"image": "image is not read"})
    assert parsed.ignored == ("topk", "passages.title", "image")
    assert parsed.warnings[0] == "topk is not read; did you mean parameters.top_k?"
    assert parsed.warnings[2] == "image is not read"
    assert parsed.names == NAMES
    many = {f"n{i}": "x" for i in range(50)}
    assert len(parse_as(NAMES, body, many).ignored) == MAX_NAMES
