"""reranker/request/parse.py alone: the meaning of each field, the errors, and the reports of unread fields.

tests/http/test_notices.py sends the same bodies to a real service.
"""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker.errors import InvalidRequestError
from reranker.request.fields import FIELDS, MAX_RANK_FIELDS
from reranker.request.parse import ParsedRequest, parse_request
from reranker.request.schema import json_schema
from reranker.request.template import SUFFIX, SYSTEM
from reranker.types import MAX_CHUNKS
from tests.conftest import ROOT
from tests.request.bodies import wear

BODY: dict[str, Any] = {"query": "q", "documents": ["a", "b"]}
COUNTS = ("top_k", "top_n", "max_tokens_per_doc", "max_chunks_per_doc", "max_chunk_per_doc")
FLAGS = ("return_documents", "return_text", "raw_scores", "use_activation", "truncate")
OPTIONAL = [name for name in FIELDS if name not in ("query", "documents", "texts")]


def parse(**more: Any) -> ParsedRequest:
    return parse_request(BODY | more)


def error_of(**more: Any) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        parse_request({name: value for name, value in (BODY | more).items() if value is not ...})
    assert caught.value.status == 422
    return str(caught.value)


def meaning(parsed: ParsedRequest) -> tuple[object, ...]:
    return parsed.request, parsed.limit, parsed.return_documents, parsed.raw_scores


def count_of(parsed: ParsedRequest, name: str) -> int | None:
    if name in ("top_k", "top_n"):
        return parsed.limit
    chunks = parsed.request.max_chunks_per_doc
    return parsed.request.max_tokens_per_doc if name == "max_tokens_per_doc" else chunks


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("value", "count"), [(1, 1), (3, 3), (3.0, 3), ("3", 3), ("12", 12), (None, None), ("", None)])
def test_counts_are_numbers_or_their_digits(name: str, value: object, count: int | None) -> None:
    for model in ({}, {"model": "m"}):
        assert count_of(parse(**{name: value}, **model), name) == count


WRONG_COUNTS = [
    -1,
    "-1",
    1.5,
    "1.5",
    "3.0",
    "three",
    " 3",
    "٣",
    "9" * 5000,
    True,
    False,
    [],
    [3],
    {},
    -1e20,
    float("inf"),
]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", WRONG_COUNTS, ids=repr)
def test_other_counts_are_refused(name: str, value: object) -> None:
    for model in ({}, {"model": "m"}):
        assert error_of(**{name: value}, **model) == f"{name}: must be a whole number of at least 1, or null"


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("zero", [0, 0.0, "0"])
def test_zero_means_not_set_beside_a_model_and_is_an_error_in_a_native_body(name: str, zero: object) -> None:
    assert meaning(parse(**{name: zero}, model="m")) == meaning(parse())
    assert parse(**{name: zero}, model="").ignored == ()
    assert count_of(parse_request({"query": "q", "texts": ["a"], "model": "m", name: zero}), name) is None
    for model in ({}, {"model": None}):
        assert error_of(**{name: zero}, **model) == f"{name}: must be a whole number of at least 1, or null"


def test_very_large_counts() -> None:
    assert parse(top_k=10**30, top_n="9" * 18).limit == 10**30
    assert parse(top_k=1e20).limit == 10**20


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [True, False, "true", "False", "TRUE", "0", "1", 0, 1, 1.0])
def test_flags(name: str, value: object) -> None:
    on = value in (True, "true", "TRUE", "1")
    parsed = parse(**{name: value})
    if name in ("return_documents", "return_text"):
        assert parsed.return_documents == on
    elif name == "truncate":
        assert (parsed.request.truncate, parsed.request.truncate_query) == (on, on)
    else:
        assert parsed.raw_scores == (on if name == "raw_scores" else not on)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["maybe", "yes", 2, -1, 0.5, [], [True], {}, "tru e"], ids=repr)
def test_other_flags_are_refused(name: str, value: object) -> None:
    assert error_of(**{name: value}) == f"{name}: must be true or false"


@pytest.mark.parametrize(
    ("raw", "activation", "logits"),
    [(None, None, False), (False, True, False), (False, False, True), (True, True, True), (None, False, True)],
)
def test_use_activation_false_asks_for_logits_as_raw_scores_does(
    raw: bool | None, activation: bool | None, logits: bool
) -> None:
    assert parse(raw_scores=raw, use_activation=activation).raw_scores == logits


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("value", [None, ""])
def test_null_and_an_empty_string_count_as_absent(name: str, value: object) -> None:
    parsed = parse(**{name: value})
    assert meaning(parsed) == meaning(parse())
    assert parsed.has_model == (name == "model" and value == "")  # "" is a model name
    assert parsed.ignored == parsed.warnings == ()
    assert parse(stranger=value).ignored == ()


def test_null_selects_no_dialect() -> None:
    assert not parse(texts=None, model=None).is_tei
    tei = parse_request({"query": "q", "documents": None, "texts": ["a"], "model": None})
    assert (tei.is_tei, tei.has_model, tei.request.documents) == (True, False, ["a"])
    assert error_of(query=None).startswith("query: is required")
    assert error_of(documents=None, texts=None) == "documents: is required"


def test_truncation_by_shape() -> None:
    """litellm sends `truncate: false` with texts whether its user wants it or not."""
    for truncate, expected in ((None, (True, False)), (True, (True, True)), (False, (False, False))):
        request = parse(truncate=truncate).request
        assert (request.truncate, request.truncate_query) == expected
        tei = parse_request({"query": "q", "texts": ["a"], "truncate": truncate}).request
        assert (tei.truncate, tei.truncate_query) == (True, True)


@pytest.mark.parametrize(
    ("name", "alias", "one", "other"),
    [
        ("top_k", "top_n", 1, 2),
        ("instruction", "instruct", "i", "j"),
        ("max_chunks_per_doc", "max_chunk_per_doc", 3, 4),
    ],
)
def test_an_alias_with_another_value_is_reported(name: str, alias: str, one: object, other: object) -> None:
    assert meaning(parse(**{alias: one})) == meaning(parse(**{name: one}))
    both = parse(**{alias: other, name: one})
    assert meaning(both) == meaning(parse(**{name: one}))
    assert (both.ignored, both.warnings) == ((alias,), (f"{alias} is not read beside {name}",))
    assert parse(**{alias: one, name: one}).warnings == ()


@pytest.mark.parametrize("key", ["instruction", "instruct"])
def test_the_instruction_of_vllm_s_clients_is_read(key: str) -> None:
    values = {key: "i\ud800", "enable_thinking": False, "query": 3}
    for body in (BODY, {"query": "q", "texts": ["a"]}):
        parsed = parse_request(body | {"chat_template_kwargs": values})
        assert (parsed.request.instruction, parsed.warnings) == ("i\ufffd", ())
    for own in ({"instruction": "j"}, {"instruct": "j"}):
        parsed = parse(chat_template_kwargs={key: "i"}, **own)
        assert (parsed.request.instruction, parsed.ignored) == ("j", (f"chat_template_kwargs.{key}",))
        assert parsed.warnings == (f"chat_template_kwargs.{key} is not read beside another instruction",)
        same = parse(chat_template_kwargs={key: "j"}, **own)
        assert (same.request.instruction, same.warnings) == ("j", ())


@pytest.mark.parametrize(
    "values", [None, "", 3, [], "instruction", {}, {"instruction": None}, {"instruct": ""}, {"prompt": "i"}]
)
def test_chat_template_values_without_an_instruction_are_not_reported(values: object) -> None:
    parsed = parse(chat_template_kwargs=values)
    assert (parsed.request.instruction, parsed.warnings) == (None, ())


@pytest.mark.parametrize("value", [3, True, [], {}])
def test_an_instruction_of_a_chat_template_must_be_a_string(value: object) -> None:
    for key in ("instruction", "instruct"):
        line = error_of(chat_template_kwargs={key: value}, instruction="own")
        assert line.startswith(f"chat_template_kwargs.{key}: must be a string; got ")


def test_documents_beside_texts_are_reported() -> None:
    parsed = parse(texts=["t"], documents=[1])
    assert (parsed.request.documents, parsed.ignored) == (["t"], ("documents",))
    assert parsed.warnings == ("documents is not read beside texts",)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *[(name, "top_k") for name in ("topk", "topK", "top-k", "Top_K", "k", "limit", "num_results")],
        *[(name, "top_n") for name in ("topn", "topN", "top_nn")],
        *[(name, "instruction") for name in ("instructions", "Instruction", "instrution", "prompt", "task")],
        *[(name, "return_documents") for name in ("returnDocuments", "return_document", "return_docs")],
        *[(name, "max_tokens_per_doc") for name in ("max_length", "maxTokensPerDoc", "max_token_per_doc")],
        *[(name, "max_chunks_per_doc") for name in ("maxChunksPerDoc", "max_chunks_per_docs")],
        *[(name, "rank_fields") for name in ("rankFields", "rank_field")],
        *[(name, "raw_scores") for name in ("raw_score", "rawScores")],
        *[(name, "truncate") for name in ("truncation", "truncate_prompt_tokens", "Truncate")],
        *[(name, "") for name in ("x", "zebra", "temperature", "stream", "options", "question", "docs")],
    ],
)
def test_an_unread_name_is_reported_with_the_field_it_resembles(name: str, field: str) -> None:
    parsed = parse(**{name: 3})
    assert parsed.ignored == (name,)
    assert parsed.warnings == (f"{name} is not read" + (f"; did you mean {field}?" if field else ""),)


HARMLESS = (
    "user priority encoding_format request_id cache_salt chat_template_kwargs model-id is_truncated overlap_tokens "
    "return_len kwargs property"
).split()


def test_harmless_fields_of_real_clients_are_not_reported_and_documented() -> None:
    assert parse(**dict.fromkeys(HARMLESS, "x")).ignored == ()
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    assert [name for name in (*HARMLESS, "truncation_direction") if f"`{name}`" not in text] == []


def test_an_unsupported_truncation_direction_is_reported() -> None:
    assert [parse(truncation_direction=way).ignored for way in ("Right", "right", None)] == [()] * 3
    assert parse(truncation_direction="Left").ignored == ("truncation_direction",)


TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,56}", re.ASCII)


NAME = st.text(st.characters(exclude_categories=()), max_size=80).filter(lambda name: name not in FIELDS)


@given(st.dictionaries(NAME, st.just(1), max_size=30))
def test_reported_names_are_few_and_short_tokens(names: dict[str, int]) -> None:
    parsed = parse_request(names | BODY)
    assert len(parsed.ignored) <= 10
    assert all(TOKEN.fullmatch(name) for name in parsed.ignored)
    assert all(text.isprintable() and text.isascii() and len(text) < 200 for text in parsed.warnings)
    assert bool(parsed.ignored) == bool(names.keys() - set(HARMLESS))


def test_an_empty_name_is_reported_as_an_underscore() -> None:
    parsed = parse(**{"": 1})
    assert (parsed.ignored, parsed.warnings) == (("_",), ("_ is not read",))


def test_a_hundred_thousand_names_are_reported_like_ten() -> None:
    many = {f"name{i}": i for i in range(100_000)}
    assert len(parse(**many).ignored) == 10
    assert error_of(documents=..., **many) == "documents: is required"
    assert len(parse(documents=[{"text": "a"} | many, {"text": "b"} | many]).ignored) == 10


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("documents", "docs doc passages passage document text contents candidates Documents documnets items chunks"),
        ("query", "question q text queries search_query Query querry input keyword"),
    ],
)
def test_a_wrong_name_of_a_required_field_is_named(field: str, names: str) -> None:
    for name in names.split():
        value = ["a"] if field == "documents" else "a"
        assert error_of(**{field: ..., name: value}) == (
            f'{field}: is required; "{name}" is not read, did you mean {field}?'
        )


def test_only_a_similar_name_is_suggested() -> None:
    assert error_of(documents=..., secret=["a"], password=1) == "documents: is required"
    assert error_of(query=..., docs=1) == "query: is required"


@pytest.mark.parametrize(
    ("value", "kind"),
    [("a", "a string"), ({}, "an object"), (3, "a number"), (True, "true or false"), (1.5, "a number")],
)
@pytest.mark.parametrize("name", ["documents", "texts"])
def test_documents_must_be_a_list(name: str, value: object, kind: str) -> None:
    assert error_of(**{name: value}) == f'{name}: must be a list of texts, such as ["a", "b"]; got {kind}'
    assert error_of(**{name: []}) == f'{name}: must hold at least one text, such as ["a", "b"]; the list is empty'


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"text": "t"}, "t"),
        ({"content": "c"}, "c"),
        ({"page_content": "p", "metadata": {"a": 1}}, "p"),
        ({"text": "", "id": 7, "meta": {}}, ""),
        ({"text": None, "content": "c"}, "c"),
        ({"text": "a\ud800"}, "a\ufffd"),
    ],
)
def test_the_text_of_an_object(document: dict[str, object], text: str) -> None:
    parsed = parse(documents=["s", document])
    assert (parsed.request.documents, parsed.ignored) == (["s", text], ())


def test_other_keys_of_objects_are_reported_once_each() -> None:
    documents = [{"text": "a", "title": 1, "none": None}, "s", {"content": "b", "title": 2, "x y": 3, "id": 4}]
    parsed = parse(documents=documents)
    assert parsed.ignored == ("documents.title", "documents.x_y")
    assert parsed.warnings[0] == "documents: title is not read; to have it read, name it in rank_fields"
    assert parse_request({"query": "q", "texts": documents}).ignored == ("texts.title", "texts.x_y")
    assert parse(documents=[{"text": "a", "content": "b"}]).ignored == ("documents.content",)


@pytest.mark.parametrize(
    "document", [None, 3, ["a"], {}, {"text": 3}, {"text": None}, {"title": "t"}, {"image": "u"}, True]
)
def test_a_document_without_a_text_is_refused_by_its_place(document: object) -> None:
    message = error_of(documents=["a", document])
    assert message.startswith('documents[1]: must be a string or an object with a string "text" (or "content", "page')
    if isinstance(document, dict):
        assert "rank_fields names other fields" in message


OBJECT = {
    "title": "T",
    "snippet": "S",
    "text": "X",
    "year": 2024,
    "new": True,
    "score": 0.5,
    "none": None,
    "tags": ["a"],
}


@pytest.mark.parametrize(
    ("rank_fields", "text"),
    [
        (["title", "snippet"], "title: T\nsnippet: S"),
        (["snippet", "title"], "snippet: S\ntitle: T"),
        (["title"], "title: T"),
        (["text"], "X"),
        (["text", "title"], "text: X\ntitle: T"),
        (["title", "title"], "title: T"),
        (["year", "new", "score"], "year: 2024\nnew: true\nscore: 0.5"),
        (["title", "none"], "title: T"),
        (["none"], ""),
        ([], "X"),
        (None, "X"),
    ],
)
def test_rank_fields_are_joined_by_line(rank_fields: object, text: str) -> None:
    parsed = parse(documents=[OBJECT, "s"], rank_fields=rank_fields)
    assert parsed.request.documents == [text, "s"]
    assert ("documents.title" in parsed.ignored) == (not rank_fields)


@pytest.mark.parametrize(
    ("rank_fields", "message"),
    [
        (["title", "body"], "documents[0]: has no field of the name that rank_fields[1] gives"),
        (["tags"], "documents[0]: the field of rank_fields[0] must be text, a number, true, false or null; got a list"),
        ("title", 'rank_fields: must be a list of names of fields, such as ["title", "text"]; got a string'),
        ({"a": 1}, 'rank_fields: must be a list of names of fields, such as ["title", "text"]; got an object'),
        (["title", 3], "rank_fields[1]: must be a string; got a number"),
        ([str(i) for i in range(MAX_RANK_FIELDS + 1)], f"rank_fields: at most {MAX_RANK_FIELDS} names"),
    ],
)
def test_rank_fields_that_cannot_be_followed_are_refused(rank_fields: object, message: str) -> None:
    assert error_of(documents=[OBJECT], rank_fields=rank_fields) == message


def test_rank_fields_of_documents_that_have_none_are_reported() -> None:
    parsed = parse(rank_fields=["title"])
    assert parsed.ignored == ("rank_fields",)
    assert parsed.warnings == ("rank_fields is not read: no document is an object",)


@pytest.mark.parametrize("query", ["q", "two\nlines\n", "a\n<Query>: b", "<Document>: x", " blank "])
def test_the_published_template_is_removed(query: str) -> None:
    parsed = parse_request(wear(query, ["a", "", "<Document>: b", SUFFIX]))
    assert (
        parsed.request
        == parse_request({"query": query, "documents": ["a", "", "<Document>: b", SUFFIX], "instruction": "I"}).request
    )
    [warning] = parsed.warnings
    assert warning == "query: Qwen's prompt template was taken off query and documents; send the bare texts"
    given = parse_request(wear(query, ["a"]) | {"instruction": "mine"})
    assert given.request.instruction == "mine"
    assert "the instruction inside it is not read beside the request's" in given.warnings[0]


def test_the_warning_names_the_texts_without_their_template() -> None:
    wrapped = wear("q", ["a", "b"])
    for documents, off in (
        (wrapped["documents"], "query and documents"),
        ([wrapped["documents"][0], "b"], "the query and some documents"),
        (["a", "b"], "the query"),
    ):
        [warning] = parse_request(wrapped | {"documents": documents}).warnings
        assert warning == f"query: Qwen's prompt template was taken off {off}; send the bare texts"


def test_the_template_of_documents_is_removed_only_with_that_of_the_query() -> None:
    wrapped = wear("q", ["a"])
    parsed = parse_request(
        wrapped | {"documents": ["plain", {"text": wrapped["documents"][0]}, f"<Document>: {SUFFIX} x"]}
    )
    assert parsed.request.documents == ["plain", "a", f"<Document>: {SUFFIX} x"]
    assert parse(documents=wrapped["documents"]).request.documents == wrapped["documents"]


GOOD = wear("q", ["a"])["query"]


@pytest.mark.parametrize(
    "query",
    [
        GOOD[:-1],
        GOOD + " ",
        GOOD.replace("<Query>", "<query>"),
        GOOD.replace("\n<Query>", " <Query>"),
        GOOD.replace("Judge", "judge"),
        GOOD.removeprefix(SYSTEM),
        "<|im_start|>user\nq<|im_end|>",
    ],
)
def test_an_inexact_template_is_text_with_a_warning(query: str) -> None:
    documents = wear("q", ["a"])["documents"]
    parsed = parse(query=query, documents=documents)
    assert (parsed.request.query, parsed.request.documents, parsed.request.instruction) == (query, documents, None)
    assert parsed.warnings[0].startswith("query: begins like a prompt template and is read as text")


def test_an_empty_instruction_inside_the_template_is_absent() -> None:
    assert parse_request(wear("q", ["a"], "")).request.instruction is None


def test_an_empty_query_inside_the_template_is_refused() -> None:
    assert error_of(**wear(" ", ["a"])) == "query: must not be empty inside the template"


def test_more_chunks_than_there_can_be_are_limited_and_said() -> None:
    assert parse(max_chunks_per_doc=MAX_CHUNKS).warnings == ()
    parsed = parse(max_chunks_per_doc=1024)
    assert parsed.request.max_chunks_per_doc == MAX_CHUNKS
    assert parsed.warnings == (f"max_chunks_per_doc: a document is split into at most {MAX_CHUNKS} chunks",)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"query": 5}, "query: must be a string; got a number"),
        ({"query": {"text": "q"}}, "query: must be a string; got an object"),
        ({"query": " \n"}, "query: must not be empty"),
        ({"query": ""}, "query: must not be empty"),
        ({"instruction": 3}, "instruction: must be a string; got a number"),
        ({"instruct": []}, "instruct: must be a string; got a list"),
        ({"model": 5}, "model: must be a string; got a number"),
        ({"documents": ""}, 'documents: must be a list of texts, such as ["a", "b"]; got a string'),
    ],
)
def test_other_errors(more: dict[str, Any], message: str) -> None:
    assert error_of(**more) == message


def test_the_schema_has_every_field_under_its_name() -> None:
    for name, other in (("documents", "texts"), ("texts", "documents")):
        schema = json_schema(name)
        assert set(schema["properties"]) | {other} == {*FIELDS, "chat_template_kwargs"}
        assert schema["required"] == ["query", name]
        assert all(schema["properties"][field].get("description") for field in FIELDS if field not in (other, "texts"))


def test_every_pair_of_fields_and_values_is_read_or_refused_by_name() -> None:
    values = [None, True, False, 0, 1, 2.0, 1.5, -1, "", "a", "1", [], ["a"], [1], {}, {"text": "a"}]
    for name, value in itertools.product(FIELDS, values):
        with suppress(InvalidRequestError):
            parse_request(BODY | {name: value})
            continue
        assert re.match(rf"{name}(\[\d\])?: [a-z]", error_of(**{name: value})), (name, value)


def test_similar_names_are_reported_first_and_the_rest_is_counted() -> None:
    strangers = {f"stranger{i}": 1 for i in range(14)}
    parsed = parse_request(BODY | strangers | {"topk": 1})
    assert parsed.ignored[0] == "topk"
    assert len(parsed.ignored) == 10
    assert parsed.warnings[0] == "topk is not read; did you mean top_k?"
    assert parsed.warnings[-1] == "5 other fields are not read either"


@pytest.mark.parametrize(
    ("fields", "texts", "logits", "ignored"),
    [
        ({"return_documents": False, "return_text": True}, False, False, ("return_text",)),
        ({"return_documents": True, "return_text": True}, True, False, ()),
        ({"return_text": True}, True, False, ()),
        ({"raw_scores": True, "use_activation": True}, False, True, ("use_activation",)),
        ({"raw_scores": False, "use_activation": False}, False, True, ("raw_scores",)),
        ({"raw_scores": True, "use_activation": False}, False, True, ()),
        ({"use_activation": False}, False, True, ()),
        ({"use_activation": True}, False, False, ()),
    ],
)
def test_flags_of_two_names_that_contradict_are_said(
    fields: dict[str, bool], texts: bool, logits: bool, ignored: tuple[str, ...]
) -> None:
    parsed = parse_request(BODY | fields)
    assert (parsed.return_documents, parsed.raw_scores, parsed.ignored) == (texts, logits, ignored)


def test_documents_in_the_template_beside_a_bare_query_are_text_with_a_warning() -> None:
    wrapped = wear("q", ["a", "b"])
    parsed = parse_request({"query": "q", "documents": wrapped["documents"]})
    assert parsed.request.documents == wrapped["documents"]
    [warning] = parsed.warnings
    assert "the first one is in Qwen's prompt template and the query is not" in warning


def test_white_space_before_a_template_does_not_suppress_the_warning() -> None:
    wrapped = wear("q", ["a"])
    [warning] = parse_request(wrapped | {"query": "\n" + wrapped["query"]}).warnings
    assert "begins like a prompt template" in warning
