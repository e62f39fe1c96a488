"""A prompt template compiled for a tokenizer: token ids where the text is static, and text to encode where it is not.

Control tokens end a text: whatever stands beside them, the tokenizer encodes the text between two of them alone. So a
prompt is a sequence of control tokens and texts, and a text with a slot is encoded as one, with the request's text in
it. The document's text is split from the text before it where no document can change the tokens on the left, so that
all documents of a request share them as their prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from reranker.engine.template import Parts, Slot, Template, fill
from reranker.errors import ModelLoadError

Encode = Callable[[str], list[int]]
_STARTS = (
    *("", "x", " x", "\nx", "\n\n", "  ", "\r\n", "\t", "'s", "é", "\u0301", "\u0338", "中", "１", "1", "_"),
    *(".", ":", "<", "-", "\ufeff", "\u200d", "🙂", "\u00a0", "\u3000x", "\ud7a3"),
)
"""Starts of documents that merge with the text before them wherever anything does."""
_ENDS = ("", "x", " ", "\n", ":", "<", "中", "1")
"""Ends of queries before that text."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One form of a template."""

    head: tuple[list[int] | Parts, ...]
    """Token ids and texts before the document."""
    lead: str
    """Text that is encoded with the document, before it."""
    tail: Parts
    """Text that is encoded with the document, after it: up to the next control token, or less before a slot."""
    suffix: tuple[list[int] | Parts, ...]
    """Token ids and texts after that."""

    def static_start(self, encode: Encode, instruction: str) -> list[int]:
        """Return the tokens before the query, or before the document if that is first."""
        texts = {Slot.INSTRUCTION: instruction}
        ids: list[int] = []
        for piece in self.head:
            if isinstance(piece, list):
                ids += piece
            elif Slot.QUERY in piece:
                return ids + encode(fill(piece[: piece.index(Slot.QUERY)], texts).rstrip())
            else:
                ids += encode(fill(piece, texts))
        return ids


def compile_frame(template: Template, parts: Parts, tokenizer: Tokenizer, control: Mapping[str, int]) -> Frame:
    """Compile a form of a template.

    Args:
        template: for its control tokens.
        parts: the form.
        tokenizer: parses no control tokens.
        control: the ids of the template's own control tokens.

    Raises:
        ModelLoadError: the texts of query and document cannot be told apart by their tokens.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    pieces = _split_at_control(parts, control)
    at = next(i for i, piece in enumerate(pieces) if not isinstance(piece, int) and Slot.DOCUMENT in piece)
    text = pieces[at]
    assert not isinstance(text, int)
    position = text.index(Slot.DOCUMENT)
    before, after = text[:position], text[position + 1 :]
    tail, rest = _split_after_document(after, tokenizer)
    lead = ""
    if before:
        shared, lead = _split_before_document(before, tokenizer)
        pieces[at] = shared
    if not (lead or after or pieces[at + 1 :]):
        raise ModelLoadError(f"{template.source} ends with the document: an empty one would have no token to score")
    head = _merged(pieces[: at + bool(before)], encode)
    if not head:
        raise ModelLoadError(f"{template.source} has no text before its texts: such a prompt cannot be packed")
    return Frame(head, lead, tail, _merged([*([rest] if rest else []), *pieces[at + 1 :]], encode))


def _split_at_control(parts: Parts, control: Mapping[str, int]) -> list[int | Parts]:
    """Return control tokens as ids, and the texts between them."""
    longest_first = sorted(control, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    pieces: list[int | Parts] = []
    text: list[str | Slot] = []

    def end() -> None:
        if text:
            pieces.append(tuple(text))
            text.clear()

    for part in parts:
        if isinstance(part, Slot):
            text.append(part)
            continue
        start = 0
        for match in pattern.finditer(part):
            if match.start() > start:
                text.append(part[start : match.start()])
            end()
            pieces.append(control[match[0]])
            start = match.end()
        if start < len(part):
            text.append(part[start:])
    end()
    return pieces


def _merged(pieces: Sequence[int | Parts], encode: Encode) -> tuple[list[int] | Parts, ...]:
    """Join control tokens and encoded static texts that follow each other."""
    merged: list[list[int] | Parts] = []
    for piece in pieces:
        if not isinstance(piece, int) and any(isinstance(part, Slot) for part in piece):
            merged.append(piece)
            continue
        ids = [piece] if isinstance(piece, int) else encode(fill(piece, {}))
        if merged and isinstance(merged[-1], list):
            merged[-1] += ids
        elif ids:
            merged.append(ids)
    return tuple(merged)


def _split_after_document(after: Parts, tokenizer: Tokenizer) -> tuple[Parts, Parts]:
    """Split the text after a document before its first slot, so that a query there is encoded once for all documents.

    The second part is empty where no place is safe.
    """
    if len(after) < 2 or isinstance(after[0], Slot):
        return after, ()
    try:
        (_, joined), start = _split_before_document((Slot.DOCUMENT, after[0]), tokenizer)
    except ModelLoadError:
        return after, ()
    return (joined,), (start, *after[1:]) if start else after[1:]


def _split_before_document(before: Parts, tokenizer: Tokenizer) -> tuple[Parts, str]:
    """Split the text before a document where its tokens depend on no document; the second part goes with documents."""
    static = before[-1]
    if isinstance(static, Slot):
        raise ModelLoadError(f"the prompt has no text between {static.value} and document")
    ends = _ENDS if len(before) > 1 else ("",)

    def ids(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    whole = ids([end + static + start for end in ends for start in _STARTS])
    for i in range(len(static), 0 if len(before) > 1 else -1, -1):
        left, right = [end + static[:i] for end in ends], [static[i:] + start for start in _STARTS]
        apart = all(_are_apart(tokenizer, a, b) for a in left for b in right)
        if apart and [a + b for a in ids(left) for b in ids(right)] == whole:
            return (*before[:-1], static[:i]), static[i:]
    raise ModelLoadError(f"the tokenizer joins the text before a document, {static!r}, with the query and the document")


def _are_apart(tokenizer: Tokenizer, left: str, right: str) -> bool:
    """Whether the pre-tokenizer splits two texts where they meet, so that no merge joins them in any vocabulary."""
    if not left or not right:
        return True
    splitter, normalizer = tokenizer.pre_tokenizer, tokenizer.normalizer
    if normalizer is not None:
        left, right = normalizer.normalize_str(left), normalizer.normalize_str(right)
    return splitter is not None and any(start == len(left) for _, (start, _) in splitter.pre_tokenize_str(left + right))
