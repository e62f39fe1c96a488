"""Which entries of ACCESS_TOKEN have a name, and that no client of an older setting is locked out."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker.http.callers import MAX_NAMES, MIN_NAMED_TOKEN, UNNAMED, Entry, entries

HEX = "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "caller", "token"),
    [
        (f"search={HEX}", "search", HEX),
        (f"a={HEX}", "a", HEX),
        (f"team-7_b={HEX}=={HEX}==", "team-7_b", f"{HEX}=={HEX}=="),
        (f"{'n' * 32}={HEX}", "n" * 32, HEX),
        ("unnamed=abc=def", UNNAMED, "abc=def"),
        (f"unnamed=search={HEX}", UNNAMED, f"search={HEX}"),
        ("unnamed===x", UNNAMED, "==x"),
    ],
)
def test_a_name_stands_before_the_first_equals_sign(text: str, caller: str, token: str) -> None:
    assert entries(f" {text} ,") == [Entry(caller, (token, text))]


@pytest.mark.parametrize(
    "text", ["abc", HEX, "YWJj", "YWI=", "YQ==", "a+b/c=d==", "x===", "=", "=abc", "$2b$12$=x", "ey.J-_9", "unnamed="]
)
def test_a_token_as_it_was_before_there_were_names(text: str) -> None:
    assert entries(text) == [Entry(UNNAMED, (text,))]


@pytest.mark.parametrize(
    "text",
    [
        "abc=def",
        f"abc={HEX[:15]}",
        f"abc=={HEX}",
        "abc=d==",
        f"Search={HEX}",
        f"7up={HEX}",
        f"a.b={HEX}",
        f"{'n' * 33}={HEX}",
        f"none={HEX}",
        f"-a={HEX}",
    ],
)
def test_what_may_be_either_is_refused_without_its_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"^entry 3 may be name=token or a token with = in it: ") as caught:
        entries(f"first,,{text}")
    with pytest.raises(ValueError, match=r"write unnamed=$") as other:
        entries(",,x=y")
    assert str(caught.value) == str(other.value), "it depends on the number of the entry only"
    assert entries(f"unnamed={text}") == [Entry(UNNAMED, (text, f"unnamed={text}"))]


def test_one_caller_may_have_several_tokens_but_a_token_only_one_caller() -> None:
    both = entries(f"search={HEX},search={HEX[::-1]},old,old")
    assert [entry.caller for entry in both] == ["search", "search", UNNAMED, UNNAMED]
    for text in (f"a={HEX},b={HEX}", f"{HEX},a={HEX}", f"a={HEX},{HEX}", f"a=b={HEX}{HEX},b={HEX}{HEX}"):
        with pytest.raises(ValueError, match=r"^entry 2 repeats the token of another caller"):
            entries(text)


def test_the_number_of_names_is_limited() -> None:
    text = ",".join(f"caller-{i}={HEX}{i}" for i in range(MAX_NAMES))
    assert len(entries(f"{text},caller-0={HEX}more,{HEX}plain")) == MAX_NAMES + 2
    with pytest.raises(ValueError, match=f"more than {MAX_NAMES} names"):
        entries(f"{text},one-more={HEX}{HEX}")


PRINTABLE = "".join(sorted(set(string.printable) - set(string.whitespace) - {","}))
TEXTS = st.text(PRINTABLE, min_size=1, max_size=60) | st.from_regex(r"\A[a-z-]{1,6}={1,2}[a-z=]{0,20}\Z")


@given(st.lists(TEXTS, max_size=4))
def test_every_token_of_an_older_setting_is_accepted_or_the_start_refused(tokens: list[str]) -> None:
    try:
        found = entries(",".join(tokens))
    except ValueError:
        return
    accepted = {text for entry in found for text in entry.accepted}
    assert accepted >= set(tokens)
    for text in accepted - set(tokens):  # what is accepted besides is hard to guess, or was declared a token
        assert len(text) >= MIN_NAMED_TOKEN or f"unnamed={text}" in tokens
