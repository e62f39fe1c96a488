from __future__ import annotations

import itertools
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmarks.card import Card
from reranker.engine.families.qwen3 import TEMPLATE
from reranker.engine.prompt import Prompt
from reranker.engine.scores import per_document
from reranker.engine.template import Slot, Template
from reranker.errors import InvalidRequestError, ModelLoadError
from reranker.request.template import SUFFIX, SYSTEM
from reranker.types import MAX_CHUNKS, EncodedRequest, RerankRequest, RerankResult, Slice
from tests.conftest import DEMO

TOKENIZER = AutoTokenizer.from_pretrained(str(DEMO))
PROMPT = Prompt(TOKENIZER, TEMPLATE)
SYSTEM_IDS: list[int] = TOKENIZER.encode(SYSTEM, add_special_tokens=False)
SUFFIX_IDS: list[int] = TOKENIZER.encode(SUFFIX, add_special_tokens=False)
CONTROL = [str(token) for token in TOKENIZER.added_tokens_decoder.values()]
# Arbitrary text, and pieces that break prompts.
TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [
            *"\n\r\t :>< .",
            "  ",
            "\r\n",
            ":",
            "'s",
            "é",
            "e\u0301",
            "\u0301",
            "中文",
            "𝒳",
            "\u200d",
            "word",
            "12",
            "\ufeff",
        ]
    ),
    max_size=30,
).map("".join)
# The card parses control tokens in texts, and hypothesis finds their names in the source.
ORDINARY = TEXT.filter(lambda text: not any(token in text for token in CONTROL))


@settings(max_examples=300, deadline=None)
@given(query=ORDINARY, document=ORDINARY, instruction=ORDINARY)
def test_the_prompt_is_the_cards_prompt_token_for_token(
    card: Card, query: str, document: str, instruction: str
) -> None:
    encoded = PROMPT.encode(RerankRequest(query, [document], instruction))
    assert encoded.prefix + encoded.documents[0] == card.ids(query, document, instruction)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(CONTROL) | TEXT, min_size=1, max_size=12))
def test_no_text_becomes_a_control_token(parts: list[str]) -> None:
    text = "".join(parts)
    control = set(TOKENIZER.added_tokens_decoder)
    encoded = PROMPT.encode(RerankRequest(text, [text], text))
    assert control.isdisjoint(encoded.prefix[len(SYSTEM_IDS) :])
    assert control.isdisjoint(encoded.documents[0][: -len(SUFFIX_IDS)])
    # And nothing outside its own span changes.
    assert encoded.prefix[: len(SYSTEM_IDS)] == SYSTEM_IDS
    assert encoded.documents[0][-len(SUFFIX_IDS) :] == SUFFIX_IDS


def test_the_cached_prefix_is_the_common_start_with_the_static_prefix() -> None:
    prompt = Prompt(TOKENIZER, TEMPLATE, instruction="Find the bug")
    plain = RerankRequest("q", ["d", "e"])

    def shared(request: RerankRequest) -> int:
        encoded = prompt.encode(request, prompt.static_prefix)
        assert encoded == replace(prompt.encode(request), cached_prefix_len=encoded.cached_prefix_len)
        assert encoded.prefix[: encoded.cached_prefix_len] == prompt.static_prefix[: encoded.cached_prefix_len]
        assert encoded.tokens == prompt.encode(request).tokens - encoded.cached_prefix_len
        part = Slice(encoded, len(encoded.documents) - 1, len(encoded.documents))
        assert (part.tokens, part.prompt_tokens) == (
            len(encoded.prefix) - encoded.cached_prefix_len + len(encoded.documents[-1]),
            len(encoded.prefix) + len(encoded.documents[-1]),
        )
        return encoded.cached_prefix_len

    assert shared(plain) == shared(RerankRequest("\n", [""])) == len(prompt.static_prefix)
    assert len(SYSTEM_IDS) < shared(RerankRequest("q", ["d"], "Find the cat")) < len(prompt.static_prefix)
    assert shared(RerankRequest("q", ["d"], "")) >= len(SYSTEM_IDS)
    assert prompt.encode(plain).cached_prefix_len == 0


def test_a_prefix_is_never_cached_as_a_whole() -> None:
    """Even if the default instruction contains a whole prompt of another one."""
    prompt = Prompt(TOKENIZER, TEMPLATE, instruction="Find\n<Query>: q\n<Document>: and so on")
    encoded = prompt.encode(RerankRequest("q", ["d"], "Find"), prompt.static_prefix)
    assert prompt.static_prefix[: len(encoded.prefix)] == encoded.prefix
    assert encoded.cached_prefix_len == len(encoded.prefix) - 1


def test_only_the_start_of_a_very_long_default_instruction_is_cached() -> None:
    prompt = Prompt(TOKENIZER, TEMPLATE, instruction="word " * 5000)
    encoded = prompt.encode(RerankRequest("q", ["d"]), prompt.static_prefix)
    assert encoded.cached_prefix_len == len(prompt.static_prefix) == 512


def test_a_surrogate_is_replaced() -> None:
    assert PROMPT.encode(RerankRequest("a\ud800b", ["\udfff"])) == PROMPT.encode(RerankRequest("a\ufffdb", ["\ufffd"]))


@pytest.mark.parametrize("unit", ["word ", "中文字", "a", " ", "\n", "=-", "e\u0301", "🙂"])
@pytest.mark.parametrize("room", [20, 100, 700])
def test_a_long_document_is_truncated_as_on_the_card(card: Card, unit: str, room: int) -> None:
    prompt = Prompt(TOKENIZER, TEMPLATE, max_seq_length=room + 100)
    card.max_length = room + 100
    try:
        encoded = prompt.encode(RerankRequest("q", [unit * 20_000, "short"]))
        expected = card.ids("q", unit * 20_000)
    finally:
        card.max_length = 8192
    assert encoded.truncated == {0}
    assert len(encoded.prefix) + len(encoded.documents[0]) == room + 100
    assert encoded.documents[0][-len(SUFFIX_IDS) :] == SUFFIX_IDS
    assert encoded.prefix + encoded.documents[0] == expected


def test_chunks_and_limits_keep_the_text_before_a_document() -> None:
    """Here it is the end of a tag, which merges with the document and so is encoded with it."""
    parts = ("<|im_start|>user\n<query>", Slot.QUERY, "</query>\n<document>", Slot.DOCUMENT, "</document><|im_end|>")
    prompt = Prompt(TOKENIZER, Template(None, parts, None, TEMPLATE.control_tokens))

    def text(**options: Any) -> list[str]:
        encoded = prompt.encode(RerankRequest("q", ["1 one two three four"], **options))
        return [str(TOKENIZER.decode(encoded.prefix + ids)).partition("</query>\n")[2] for ids in encoded.documents]

    assert text() == ["<document>1 one two three four</document><|im_end|>"]
    assert text(max_tokens_per_doc=1) == ["<document>1</document><|im_end|>"]
    chunks = text(max_tokens_per_doc=2, max_chunks_per_doc=9)
    assert len(chunks) > 2
    assert all(chunk.startswith("<document>") and chunk.endswith("</document><|im_end|>") for chunk in chunks)
    prompt.max_seq_length = len(prompt.encode(RerankRequest("q", [""])).prefix) + 8
    encoded = prompt.encode(RerankRequest("q", ["one two three four " * 9], max_chunks_per_doc=9))
    assert max(map(len, encoded.documents)) + len(encoded.prefix) == prompt.max_seq_length


def test_letters_before_a_document_are_encoded_with_it_whatever_the_vocabulary_merges() -> None:
    parts = ("<|im_start|>q: ", Slot.QUERY, " text d", Slot.DOCUMENT)
    prompt = Prompt(TOKENIZER, Template(None, parts, None, TEMPLATE.control_tokens))
    for document in ["e", "oc", *"abcdefghijklmnopqrstuvwxyz", "x", ""]:
        encoded = prompt.encode(RerankRequest("one", [document]))
        whole = TOKENIZER.encode(f"<|im_start|>q: one text d{document}", add_special_tokens=False)
        assert encoded.prefix + encoded.documents[0] == whole


def test_a_document_that_just_fits_is_not_truncated() -> None:
    encoded = PROMPT.encode(RerankRequest("q", ["word " * 50]))
    needed = len(encoded.prefix) + len(encoded.documents[0])
    fits = Prompt(TOKENIZER, TEMPLATE, max_seq_length=needed).encode(RerankRequest("q", ["word " * 50]))
    assert fits == encoded
    cut = Prompt(TOKENIZER, TEMPLATE, max_seq_length=needed - 1).encode(RerankRequest("q", ["word " * 50]))
    assert cut.truncated == {0}
    assert len(cut.documents[0]) == len(encoded.documents[0]) - 1


def test_ten_million_characters_are_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    class Counting:
        def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
            nonlocal seen
            seen += sum(map(len, texts))
            return PROMPT.text_tokenizer.encode_batch_fast(texts, **options)

    prompt = Prompt(TOKENIZER, TEMPLATE, max_seq_length=512)
    monkeypatch.setattr(prompt, "text_tokenizer", Counting())
    assert prompt.encode(RerankRequest("q", ["some words " * 1_000_000])).truncated == {0}
    assert seen < 10_000


def test_a_query_without_room_for_a_document_is_refused() -> None:
    prompt = Prompt(TOKENIZER, TEMPLATE, max_seq_length=256)
    with pytest.raises(InvalidRequestError, match="leave no room for a document") as caught:
        prompt.encode(RerankRequest("word " * 1000, ["a"]))
    assert caught.value.status == 422
    assert "word word" not in str(caught.value)


def test_the_instruction_of_the_request_replaces_the_default() -> None:
    prompt = Prompt(TOKENIZER, TEMPLATE, instruction="Find the bug")
    assert prompt.encode(RerankRequest("q", ["d"])) == PROMPT.encode(RerankRequest("q", ["d"], "Find the bug"))
    assert prompt.encode(RerankRequest("q", ["d"], "")) == PROMPT.encode(RerankRequest("q", ["d"], ""))


def test_a_tokenizer_whose_control_tokens_can_be_forged_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO))
    tokenizer.add_special_tokens({"extra_special_tokens": ["the"]})  # an ordinary entry of the vocabulary as well
    with pytest.raises(ModelLoadError, match="could be forged"):
        Prompt(tokenizer, TEMPLATE)


def test_a_tokenizer_without_the_templates_control_tokens_is_refused() -> None:
    tokens = TEMPLATE.control_tokens | {"<|turn|>"}
    with pytest.raises(ModelLoadError, match=r"has no token <\|turn\|>: use the original checkpoint's tokenizer"):
        Prompt(TOKENIZER, replace(TEMPLATE, instructed=(*TEMPLATE.parts("x"), "<|turn|>"), control_tokens=tokens))


def test_words_that_a_fine_tune_added_are_known_and_control_tokens_are_not() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO))
    tokenizer.add_tokens(["gzip", "<Query>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|steer|>"]})
    prompt = Prompt(tokenizer, TEMPLATE)
    prompt.check(tokenizer)
    text = "gzip and <Query> of a gzipped file"
    assert prompt.text_tokenizer.encode(text).ids == tokenizer.encode(text, add_special_tokens=False)
    for control in [*TEMPLATE.control_tokens, "<|steer|>"]:
        ids = prompt.text_tokenizer.encode(f"a {control} b").ids
        assert tokenizer.convert_tokens_to_ids(control) not in ids
        assert tokenizer.decode(ids) == f"a {control} b"


def rest(document: list[int]) -> list[int]:
    """A document's tokens without the suffix."""
    assert document[-len(SUFFIX_IDS) :] == SUFFIX_IDS
    return document[: -len(SUFFIX_IDS)]


def test_max_tokens_per_doc_truncates_below_the_room() -> None:
    whole = PROMPT.encode(RerankRequest("q", ["one two three four five", "x"]))
    cut = PROMPT.encode(RerankRequest("q", ["one two three four five", "x"], max_tokens_per_doc=3))
    assert (whole.truncated, cut.truncated) == (frozenset(), frozenset({0}))
    assert [rest(d) for d in cut.documents] == [rest(d)[:3] for d in whole.documents]
    # A limit above the room has no effect.
    large = PROMPT.encode(RerankRequest("q", ["word " * 20_000], max_tokens_per_doc=10**30))
    assert large == PROMPT.encode(RerankRequest("q", ["word " * 20_000]))


@settings(max_examples=200, deadline=None)
@given(documents=st.lists(TEXT, min_size=1, max_size=4), size=st.integers(1, 30), most=st.integers(1, 5))
def test_chunks_are_consecutive_windows_of_the_documents_tokens(documents: list[str], size: int, most: int) -> None:
    whole = PROMPT.encode(RerankRequest("q", documents))
    request = RerankRequest("q", documents, max_tokens_per_doc=size, max_chunks_per_doc=most)
    encoded = PROMPT.encode(request)
    assert encoded.prefix == whole.prefix
    assert encoded.chunks is not None
    entries = iter(encoded.documents)
    cut = set()
    for i, (text, document, borders) in enumerate(zip(documents, whole.documents, encoded.chunks, strict=True)):
        windows = [rest(next(entries)) for _ in borders[1:]]
        assert [len(w) for w in windows[:-1]] == [size] * (len(windows) - 1)
        assert [token for w in windows for token in w] == rest(document)[: size * most]
        assert borders == sorted(borders)
        assert borders[0] == 0
        if len(rest(document)) > size * most:
            cut.add(i)
            assert len(windows) == most
        else:
            assert borders[-1] == len(text)
    assert next(entries, None) is None
    assert encoded.truncated == cut


def test_every_chunk_follows_the_line_before_the_document() -> None:
    """The tokenizer joins that line break with those of a document; it is no part of a document's length."""
    user = ("<|im_start|>user\n", Slot.DOCUMENT, "<|im_end|>\n")
    parts = ("<|im_start|>system\n", Slot.QUERY, "<|im_end|>\n", *user)
    prompt = Prompt(TOKENIZER, Template(None, parts, None, TEMPLATE.control_tokens), max_seq_length=128)
    words, [line] = "a b c d e", TOKENIZER.encode("\n", add_special_tokens=False)
    ids, end = TOKENIZER.encode(words, add_special_tokens=False), TOKENIZER.encode("<|im_end|>\n")
    encoded = prompt.encode(RerankRequest("q", [words, "\n\n", "a" * 9999], max_tokens_per_doc=2, max_chunks_per_doc=3))
    assert encoded.documents[:-3] == [
        *([line, *ids[i : i + 2], *end] for i in range(0, len(ids), 2)),
        [*TOKENIZER.encode("\n\n\n", add_special_tokens=False), *end],
    ]
    assert len(ids) == 5
    assert encoded.truncated == {2}
    long = prompt.encode(RerankRequest("q", ["x " * 9999], max_chunks_per_doc=3))
    assert [len(long.prefix) + len(document) for document in long.documents] == [128] * 3
    problem = r"documents\[0\]: longer than the limit of 2 tokens"
    with pytest.raises(InvalidRequestError, match=problem):
        prompt.encode(RerankRequest("q", [words], max_tokens_per_doc=2, truncate=False))


def test_a_query_after_the_document_is_tokenised_once() -> None:
    """Not once per document: a thousand short documents and a long query would take ten seconds."""
    parts = ("<Document> ", Slot.DOCUMENT, "\n<Query> ", Slot.QUERY, " ??")
    prompt = Prompt(TOKENIZER, Template(None, parts, None, TEMPLATE.control_tokens))
    [frame] = prompt._frames.values()
    assert (frame.tail, frame.suffix) == (("\n<Query>",), ((" ", Slot.QUERY, " ??"),))
    for document in ("", "x\n", "a <", "?"):
        encoded = prompt.encode(RerankRequest("why ?", [document]))
        text = f"<Document> {document}\n<Query> why ? ??"
        assert encoded.prefix + encoded.documents[0] == TOKENIZER.encode(text, add_special_tokens=False)


def test_borders_of_chunks_partition_the_text() -> None:
    text = "one two three four five six seven"
    encoded = PROMPT.encode(RerankRequest("q", [text], max_tokens_per_doc=1, max_chunks_per_doc=99))
    assert encoded.chunks is not None
    borders = encoded.chunks[0]
    parts = [text[a:b] for a, b in itertools.pairwise(borders)]
    assert "".join(parts) == text
    for part, document in zip(parts, encoded.documents, strict=True):
        assert PROMPT.text_tokenizer.decode(rest(document)).strip() == part.strip()


def test_the_number_of_chunks_is_bounded() -> None:
    request = RerankRequest("q", ["word " * 1000], max_tokens_per_doc=2, max_chunks_per_doc=10**30)
    encoded = PROMPT.encode(request)
    assert (len(encoded.documents), encoded.truncated) == (MAX_CHUNKS, frozenset({0}))


def test_a_document_that_may_not_be_truncated_is_named_by_its_index() -> None:
    documents = ["a", "one two three four five"]
    request = RerankRequest("q", documents, max_tokens_per_doc=3, truncate=False, positions=[4, 11])
    with pytest.raises(InvalidRequestError, match=r"documents\[11\]: longer than the limit of 3 tokens") as caught:
        PROMPT.encode(request)
    assert "four" not in str(caught.value)
    fits = RerankRequest("q", ["a", "one two three"], max_chunks_per_doc=2, max_tokens_per_doc=3, truncate=False)
    assert PROMPT.encode(fits).truncated == set()


def read_query(prompt: Prompt, prefix: list[int]) -> str:
    """The query in a prefix, of a vocabulary in which every token is text."""
    text: str = prompt.text_tokenizer.decode(prefix[len(SYSTEM_IDS) :])
    return text.partition("\n<Query>: ")[2].removesuffix("\n<Document>:")


@pytest.mark.parametrize("unit", ["word ", "中文字", "a", " ", "\n", "=-", "e\u0301", "🙂", "don't "])
@pytest.mark.parametrize("length", [100, 257, 1000])
def test_a_truncated_query_is_the_cards_prompt_of_its_start(card: Card, unit: str, length: int) -> None:
    prompt = Prompt(TOKENIZER, TEMPLATE, max_seq_length=length)
    query = unit * 5000
    request = RerankRequest(query, ["a document", "word " * 5000], truncate_query=True)
    encoded = prompt.encode(request)
    start = read_query(prompt, encoded.prefix)
    assert encoded.query_truncated
    assert unicodedata.normalize("NFC", query).startswith(start)  # which the tokenizer composes
    assert start
    # Query and document share the room beside template and instruction.
    free = length - len(SUFFIX_IDS) - len(prompt.encode(RerankRequest("", ["x"])).prefix)
    used = len(encoded.prefix) + free + len(SUFFIX_IDS) - length
    assert free / 2 - 8 <= used <= free / 2 + 2
    assert encoded.truncated == {1}
    assert len(encoded.prefix) + len(encoded.documents[1]) == length
    for document, ids in zip(request.documents, encoded.documents, strict=True):
        card.max_length = length
        try:
            assert encoded.prefix + ids == card.ids(start, document)
        finally:
            card.max_length = 8192
    assert prompt.encode(RerankRequest(start, request.documents)) == replace(encoded, query_truncated=False)


def test_a_query_that_leaves_any_room_stays_whole() -> None:
    words = "word " * 100
    needed = len(PROMPT.encode(RerankRequest(words, [""])).prefix) + len(SUFFIX_IDS)
    for room in (1, 2, 100):
        prompt = Prompt(TOKENIZER, TEMPLATE, max_seq_length=needed + room)
        whole = prompt.encode(RerankRequest(words, ["one two three"], truncate_query=True))
        assert whole == prompt.encode(RerankRequest(words, ["one two three"]))
        assert not whole.query_truncated
    prompt = Prompt(TOKENIZER, TEMPLATE, max_seq_length=needed)
    assert prompt.encode(RerankRequest(words, ["one"], truncate_query=True)).query_truncated
    with pytest.raises(InvalidRequestError, match=r"send truncate: true to have it truncated, or raise MAX_SEQ_LENGTH"):
        prompt.encode(RerankRequest(words, ["one"]))


@pytest.mark.parametrize("truncate_query", [True, False])
@pytest.mark.parametrize("words", [150, 100_000])
def test_an_instruction_is_never_truncated(words: int, truncate_query: bool) -> None:
    prompt = Prompt(TOKENIZER, TEMPLATE, max_seq_length=200)
    request = RerankRequest("word " * 500, ["a"], "word " * words, truncate_query=truncate_query)
    with pytest.raises(
        InvalidRequestError, match="prompt and instruction leave no room for a query and a document in 200 t"
    ):
        prompt.encode(request)


def test_ten_million_characters_of_a_query_are_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    class Counting:
        def __getattr__(self, name: str) -> object:
            def encode(texts: list[str], **options: bool) -> object:
                nonlocal seen
                seen += sum(map(len, texts))
                return getattr(PROMPT.text_tokenizer, name)(texts, **options)

            return encode

    prompt = Prompt(TOKENIZER, TEMPLATE, max_seq_length=512)
    monkeypatch.setattr(prompt, "text_tokenizer", Counting())
    encoded = prompt.encode(RerankRequest("some words " * 1_000_000, ["a"], truncate_query=True))
    assert encoded.query_truncated
    assert seen < 20_000


def test_parts_of_a_request_record_that_its_query_was_truncated() -> None:
    prompt = Prompt(TOKENIZER, TEMPLATE, max_seq_length=200)
    request = RerankRequest("word " * 500, ["a", "b", "c"], truncate_query=True)
    whole = prompt.encode(request)
    assert EncodedRequest.join([prompt.encode(request.only([0])), prompt.encode(request.only([1, 2]))]) == whole
    assert RerankResult.of(per_document(whole, [0.0] * 3)).query_truncated
    split = prompt.encode(replace(request, max_chunks_per_doc=2))
    assert RerankResult.of(per_document(split, [0.0] * 3)).query_truncated
