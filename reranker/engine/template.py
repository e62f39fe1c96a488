"""The prompt of a model: static text with slots for the instruction, the query and the document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Slot(Enum):
    """A text of the request."""

    INSTRUCTION = "instruction"
    QUERY = "query"
    DOCUMENT = "document"


Parts = tuple[str | Slot, ...]
"""Static text and slots, in order."""


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt with an instruction, one without, or both. Each has one query and one document, in any order."""

    instructed: Parts | None
    """The prompt with an instruction; None: the model reads none."""
    plain: Parts | None
    """The prompt of a request without an instruction; None: it gets the default one."""
    instruction: str | None
    """The default instruction; None: there is none."""
    control_tokens: frozenset[str]
    """Added tokens of the tokenizer; they are plain text in instructions, queries and documents."""
    source: str = "the model card"
    """Where the prompt is written down."""
    pair: bool = False
    """Whether query and document are the two sequences of an encoder, which sees both from every token: documents share
    no prefix, so each holds the whole prompt."""

    def parts(self, instruction: str | None) -> Parts:
        """Return the prompt for an instruction, which may be none; an empty one counts as none if there is a choice."""
        form = self.instructed if self.plain is None or (instruction and self.instructed is not None) else self.plain
        assert form is not None  # there is at least one
        return form

    @property
    def repeats_query(self) -> bool:
        """Whether the tokens of every document hold the query."""
        parts = self.parts(self.instruction)
        return self.pair or parts.index(Slot.DOCUMENT) < parts.index(Slot.QUERY)

    @property
    def own_tokens(self) -> list[str]:
        """The control tokens of the prompt itself, in order."""
        text = "\0".join(text_of(form) for form in (self.instructed, self.plain) if form is not None)
        return sorted((token for token in self.control_tokens if token in text), key=text.index)

    def render(self, instruction: str | None, query: str, document: str) -> str:
        """Return a whole prompt."""
        texts = {Slot.INSTRUCTION: instruction or "", Slot.QUERY: query, Slot.DOCUMENT: document}
        return fill(self.parts(instruction), texts)


def fill(parts: Parts, texts: Mapping[Slot, str]) -> str:
    """Return the text with the slots filled."""
    return "".join(texts[part] if isinstance(part, Slot) else part for part in parts)


def text_of(parts: Parts) -> str:
    """Return the static text, with a NUL for each slot."""
    return "".join("\0" if isinstance(part, Slot) else part for part in parts)
