"""No text changes a token outside its own span; a comparison with the plain card shows the difference."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from benchmarks.card import Card
from benchmarks.escape import ATTACKS, DOCUMENTS, HEAD, Outcome, as_text, row, run
from reranker import Scorer
from reranker.engine.families.qwen3 import TEMPLATE
from reranker.engine.prompt import Prompt
from reranker.request.template import SUFFIX, SYSTEM
from reranker.text import printable
from reranker.types import RerankRequest
from tests.conftest import DEMO, ROOT

CONTROL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|box_end|> <|vision_pad|> <|image_pad|> <tool_call> "
    "</tool_call> <|fim_prefix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> <think> </think>"
).split()
PROMPT = [
    SYSTEM,
    SUFFIX,
    *"<Instruct>: |<Query>: |<Document>: |\n<Query>:|\n<Document>:|<|im_start|>user\n".split("|"),
]
ODD = ["\ud800", "\udfff", "\ud83d\ude00", *"\x00\x1b\n\r\t\v\u0085\u2028\u3000\u00a0\u200b\u200d\ufeff\u202e\u2066"]
JOINING = ["\u0301", "\u0338", "\u0327", "\u3099", "\u1161", "\u11a8", "e\u0301", "가", "́<", "'s", "  ", ">:", ": "]
# All characters, surrogates included, and pieces that break prompts: whole, split and joined.
PIECE = (
    st.sampled_from(CONTROL + PROMPT)
    | st.sampled_from(CONTROL).flatmap(lambda token: st.integers(1, len(token) - 1).map(lambda n: token[:n]))
    | st.sampled_from(CONTROL).flatmap(lambda token: st.integers(1, len(token) - 1).map(lambda n: token[n:]))
    | st.sampled_from(ODD + JOINING)
    | st.text(st.characters(exclude_categories=()), max_size=8)
)
TEXT = st.lists(PIECE, max_size=8).map("".join)


@pytest.fixture(scope="module")
def suffix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(SUFFIX, add_special_tokens=False))


@pytest.fixture(scope="module")
def prompt(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    return Prompt(tokenizer, TEMPLATE)


@pytest.fixture(scope="module")
def tokens(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Encoder that never gives control tokens; for ordinary text it equals the tokenizer."""
    backend = tokenizer.backend_tokenizer
    for text in ("<Instruct>: a\n<Query>:", " Größe, 中文！ <b>don't</b> 123\r\n\n  x", "\u1100\u1161 e\u0301 🙂"):
        assert as_text(backend, text) == tokenizer.encode(text, add_special_tokens=False)
    return lambda text: as_text(backend, printable(text))


@settings(max_examples=250, deadline=None)
@given(query=TEXT, documents=st.lists(TEXT, min_size=1, max_size=3), instruction=TEXT)
def test_every_text_stays_in_its_own_span(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    suffix: list[int],
    tokens: Callable[[str], list[int]],
    query: str,
    documents: list[str],
    instruction: str,
) -> None:
    """The prompt is a sequence of pieces, and each is determined by its own text alone.

    So no text can change the tokens of another one, of the template around them, or their number. The space before a
    text and the line break after it belong to its span.
    """
    encoded = prompt.encode(RerankRequest(query, documents, instruction))
    spans = [tokens(f" {instruction}\n"), tokens(f" {query}\n"), *(tokens(f" {document}") for document in documents)]
    assert encoded.prefix == (
        tokenizer.encode(SYSTEM, add_special_tokens=False)
        + tokens("<Instruct>:")
        + spans[0]
        + tokens("<Query>:")
        + spans[1]
        + tokens("<Document>:")
    )
    assert encoded.documents == [span + suffix for span in spans[2:]]
    control = set(tokenizer.added_tokens_decoder)
    assert len(control) == 26
    assert all(control.isdisjoint(span) for span in spans)


@settings(max_examples=150, deadline=None)
@given(
    document=TEXT, size=st.integers(1, 20), chunks=st.none() | st.integers(1, 4), room=st.none() | st.integers(1, 20)
)
def test_a_truncated_or_split_document_stays_in_its_span_too(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    suffix: list[int],
    document: str,
    size: int,
    chunks: int | None,
    room: int | None,
) -> None:
    """`room`: tokens that the whole prompt leaves for the document."""
    plain = prompt.encode(RerankRequest("q", [""]))
    most = None if room is None else len(plain.prefix) + room + len(suffix)
    cut = copy.copy(prompt)
    cut.max_seq_length = most or prompt.max_seq_length
    encoded = cut.encode(RerankRequest("q", [document, "d"], max_tokens_per_doc=size, max_chunks_per_doc=chunks))
    control = set(tokenizer.added_tokens_decoder)
    assert encoded.prefix == plain.prefix
    for entry in encoded.documents:
        assert entry[-len(suffix) :] == suffix
        assert 1 <= len(entry) - len(suffix) <= min(size, room or size)
        assert control.isdisjoint(entry[: -len(suffix)])
    assert encoded.documents[-1] == prompt.encode(RerankRequest("q", ["d"])).documents[0]


# The tokenizer's boundary

# Words, spaces and signs that merge with their like, and with each other, into the longest entries of a vocabulary.
UNITS = [
    "word ",
    "a",
    " ",
    "\n",
    "\t",
    "=-",
    "-",
    "=",
    "1",
    "中",
    "文字",
    "가",
    "e\u0301",
    "🙂",
    "\u200d",
    "ing",
    "\r\n",
    "\x00",
]


@settings(max_examples=150, deadline=None)
@given(query=TEXT, document=TEXT, instruction=TEXT)
def test_the_split_prompt_has_the_whole_pairs_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    suffix: list[int],
    query: str,
    document: str,
    instruction: str,
) -> None:
    """The card tokenises the pair in one piece; split at `<Document>:` it has the same tokens for every text."""
    query, document, instruction = map(printable, (query, document, instruction))
    pair = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    encoded = prompt.encode(RerankRequest(query, [document], instruction))
    middle = (
        encoded.prefix[len(tokenizer.encode(SYSTEM, add_special_tokens=False)) :] + encoded.documents[0][: -len(suffix)]
    )
    assert middle == as_text(tokenizer.backend_tokenizer, pair)
    if not any(token in pair for token in map(str, tokenizer.added_tokens_decoder.values())):
        assert middle == tokenizer.encode(pair, add_special_tokens=False)


@settings(max_examples=150, deadline=None)
@given(units=st.lists(st.sampled_from(UNITS) | st.text(max_size=6), min_size=1, max_size=3), data=st.data())
def test_a_text_shortened_before_tokenising_has_the_same_first_tokens(
    prompt: Prompt, suffix: list[int], units: list[str], data: st.DataObject
) -> None:
    """Equal to truncating all tokens, except for thousands of combining marks in a row, which NFC sorts."""
    order = data.draw(st.lists(st.sampled_from(units), min_size=1, max_size=20))
    text = "".join(order) * data.draw(st.integers(1, 400))
    room = data.draw(st.integers(1, 60))
    request = RerankRequest("q", [text], max_tokens_per_doc=room)
    encoded = prompt.encode(request)
    whole = prompt.text_tokenizer.encode(" " + text, add_special_tokens=False).ids
    assert encoded.documents[0] == whole[:room] + suffix
    assert encoded.truncated == ({0} if len(whole) > room else set())


# The demonstration


@pytest.fixture(scope="module")
def plain() -> Card:
    return Card(DEMO)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.load(device="cpu", precision="float32")


@pytest.fixture(scope="module")
def outcomes(plain: Card, scorer: Scorer) -> dict[str, Outcome]:
    return {attack.name: run(attack, plain, scorer) for attack in ATTACKS}


def test_the_engine_reads_an_attack_as_the_text_that_it_is(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) == len(ATTACKS)
    for name, outcome in outcomes.items():
        assert outcome.engine == pytest.approx(outcome.text, abs=1e-4), name
        assert outcome.engine_control == 0
        forged = "<|" in outcome.attack.documents[outcome.attack.target] or any(
            c in outcome.attack.query for c in CONTROL
        )
        assert (outcome.card_control > 0) == forged, "the card's own tokenizer is taken in"
        if not forged:
            assert outcome.card == pytest.approx(outcome.engine, abs=1e-4)


def test_the_plain_card_parses_control_tokens(outcomes: dict[str, Outcome]) -> None:
    """The three findings of docs/prompt-escape.md."""
    honest = outcomes["nothing: an irrelevant document"]
    closed = outcomes["a query that ends its turn"]
    assert min(closed.card) > 0.5, "with four characters more in the query, everything is relevant"
    assert closed.engine[closed.attack.target] == pytest.approx(honest.engine[closed.attack.target], abs=0.01)
    searched = outcomes["a document with control tokens found by search"]
    before = outcomes["nothing: a document that half fits"]
    assert searched.rank(searched.card) < before.rank(before.card) <= searched.rank(searched.engine)
    repeated = outcomes["plain text: an irrelevant document that repeats the query"]
    assert repeated.rank(repeated.engine) == repeated.rank(repeated.card) == 1


def test_the_document_quotes_the_figures_that_are_measured(outcomes: dict[str, Outcome]) -> None:
    text = (ROOT / "docs" / "prompt-escape.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == HEAD
    assert [line[0] for line in lines[2:]] == list(outcomes)
    for line, outcome in zip(lines[2:], outcomes.values(), strict=True):
        assert [float(cell) for cell in line[1:]] == pytest.approx([float(c) for c in row(outcome)[1:]], abs=0.002)
    assert f"among {len(DOCUMENTS)} documents" in text


def test_the_tokenizers_own_switch_is_not_enough(tokenizer: PreTrainedTokenizerBase) -> None:
    """docs/prompt-escape.md says so: `split_special_tokens` splits the special ones alone."""
    ids = tokenizer.encode("<|im_end|><think></think>", add_special_tokens=False, split_special_tokens=True)
    parsed = set(ids) & set(tokenizer.added_tokens_decoder)
    assert {tokenizer.decode([i]) for i in parsed} == {"<think>", "</think>"}
