"""Tokenise requests: fill a template, truncate, split into chunks; control tokens in user text stay text."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from reranker.engine.escape import control_ids, text_tokenizer
from reranker.engine.frame import compile_frame
from reranker.engine.template import Parts, Slot, Template, fill
from reranker.errors import InvalidRequestError, ModelLoadError
from reranker.text import printable
from reranker.types import MAX_CHUNKS, EncodedRequest, RerankRequest

logger = logging.getLogger(__name__)

# Characters per wanted token that are tokenised first (English has about 4.5); doubled where they were too few.
_CHARACTERS_PER_TOKEN = 4
# Tokens near the end of a shortened text may differ from those of the whole text; the last 32 are not trusted.
_UNSURE_TOKENS = 32
# Of a pair: WordPiece replaces a word of more than 100 characters by one token, and its start may become as many.
_UNSURE_PAIR_TOKENS = 128
# Limit for a default instruction of many pages: the cache of a 4B model takes 0.3 MB a token in float32.
_MAX_STATIC_PREFIX = 512
# Tokens of a truncated query; an instruction that leaves room for fewer is too long itself.
_MIN_QUERY_TOKENS = 8
_OTHER_TOKENS = (
    "the tokenizer gives a prompt other tokens than the original's (see normalizer and pre_tokenizer in "
    "tokenizer.json): use the original checkpoint's tokenizer"
)


@dataclass(frozen=True, slots=True)
class _Filled:
    """A frame with the texts of a request, except its documents."""

    prefix: list[int]
    """Tokens before every document."""
    lead: str
    """Text that is encoded with a document, before it."""
    before: list[int]
    """Tokens before the second chunk and those after it: those of `lead` alone; a last space is in the first word."""
    tail: str
    """Text that is encoded with a document, after it."""
    end: list[int]
    """Tokens after a truncated document or a chunk: those of `tail` alone, then the suffix."""
    suffix: list[int]

    @property
    def size(self) -> int:
        """Tokens beside the document."""
        return len(self.prefix) + len(self.before) + len(self.end)


class Prompt:
    """Builds the token ids of a request.

    User text is encoded with a copy of the tokenizer that has no added tokens, so that a control token inside a query
    or a document is ordinary text; ordinary text gets identical ids.

    Args:
        tokenizer: the checkpoint's tokenizer (a fast one).
        template: the model family's, or the checkpoint's own.
        max_seq_length: limit of the whole prompt, in tokens.
        instruction: for requests without one; None: the template's.

    Raises:
        ModelLoadError: the tokenizer lacks control tokens of the template, or parses control tokens in user text; the
            template cannot be split into prefix and documents.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        max_seq_length: int = 8192,
        instruction: str | None = None,
    ) -> None:
        self.template = template
        self.instruction = template.instruction if instruction is None else instruction
        self.max_seq_length = max_seq_length
        self._said = False
        self.text_tokenizer = text_tokenizer(tokenizer, template.control_tokens)
        control = control_ids(tokenizer, template)
        self._frames = {
            parts: compile_frame(template, parts, self.text_tokenizer, control)
            for parts in (template.instructed, template.plain)
            if parts is not None
        }
        self.max_token_characters = max(map(len, self.text_tokenizer.get_vocab())) if not template.pair else math.inf
        """Upper bound of the characters that one token stands for (byte-level entries: at most one per byte). There is
        none for tokenizers of encoders: they drop spaces, and have one token for many unknown characters."""
        self._unsure_tokens = _UNSURE_PAIR_TOKENS if template.pair else _UNSURE_TOKENS
        self.static_prefix: list[int] = []
        """Start of every prompt with the default instruction; a prompt with another one shares the first tokens."""
        if not template.pair:
            frame = self._frames[template.parts(self.instruction)]
            start = frame.static_start(self._encode_text, printable(self.instruction or ""))
            self.static_prefix = start[:_MAX_STATIC_PREFIX]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that gives the parts of a prompt other tokens than the whole.

        Raises:
            ModelLoadError: its normalizer or pre-tokenizer merges text across the end of a part.
        """
        encode, pair = self.text_tokenizer.encode, self.template.pair
        if not pair and encode(" x\n", add_special_tokens=False).ids == encode("x", add_special_tokens=False).ids:
            raise ModelLoadError(_OTHER_TOKENS)
        instructions = {"", self.instruction or "x"} if self.template.instructed is not None else {""}
        for query, document in (("how to compress files", " gzip\n"), ("如何压缩文件", "Ａ gzip"), ("x", "x")):
            for instruction in instructions:
                encoded = self.encode(RerankRequest(query, [document], instruction))
                if pair:
                    expected = tokenizer.encode(query, document)
                else:
                    text = self.template.render(instruction, query, document)
                    expected = tokenizer.encode(text, add_special_tokens=False)
                if encoded.prefix + encoded.documents[0] != expected:
                    raise ModelLoadError(_OTHER_TOKENS)

    def encode(self, request: RerankRequest, cached_prefix: Sequence[int] = ()) -> EncodedRequest:
        """Tokenise a request; documents that do not fit are truncated from the right, the text after them stays.

        The limit of a document is the rest of `max_seq_length` beside the prompt, or `max_tokens_per_doc` where that is
        less. With `max_chunks_per_doc` a longer document becomes consecutive windows of that many tokens (the last one
        shorter), each in the same prompt; text after the last allowed window is truncated.

        With `truncate_query` a query that leaves no room for a document is truncated from the right, to at most half
        of the tokens that template and instruction leave, so that documents have the other half. A query that leaves
        any room stays whole. The instruction is never truncated.

        Args:
            request: the texts.
            cached_prefix: tokens whose keys and values the model has cached; the prefix's common start with them is
                not computed again.

        Raises:
            InvalidRequestError: query and instruction leave no room for a document; a document would have to be
                truncated and `truncate` is false.
        """
        if request.instruction and self.template.instructed is None and not self._said:
            self._said = True
            logger.warning("instructions of requests are not read: the prompt of this checkpoint has none")
        filled, query_truncated = self._filled(request)
        room = self.max_seq_length - filled.size
        size = min(room, request.max_tokens_per_doc or room)
        first = len(filled.before) + size
        limit = first + size * (min(request.max_chunks_per_doc or 1, MAX_CHUNKS) - 1)
        split = request.max_chunks_per_doc is not None
        texts = [filled.lead + printable(document) for document in request.documents]
        lead = len(filled.lead)
        documents: list[list[int]] = []
        whole: dict[int, int] = {}
        chunks: list[list[int]] = []
        truncated: set[int] = set()
        for i, encoding in enumerate(self._encode_start(texts, limit, offsets=split)):
            ids, end = encoding.ids, len(texts[i]) - lead
            if len(ids) > limit:
                if not request.truncate:
                    problem = (
                        f"documents[{request.position(i)}]: longer than the limit of {limit - first + size} tokens"
                    )
                    raise InvalidRequestError(f"{problem}; shorten it, or omit truncate to have it truncated")
                truncated.add(i)
                end = _character(encoding, limit, lead) if split else end
            later = range(first, min(len(ids), limit), size)
            if len(ids) <= first:
                whole[i] = len(documents)
            documents.append(ids[:first] + filled.end)
            documents += [filled.before + ids[start : start + size] + filled.end for start in later]
            if split:
                chunks.append([0, *(_character(encoding, start, lead) for start in later), end])
        if filled.tail:
            self._join_tail(documents, {place: texts[i] for i, place in whole.items()}, filled)
        if self.template.pair:
            documents = [filled.prefix + document for document in documents]
            filled = replace(filled, prefix=[])
        common = takewhile(lambda pair: pair[0] == pair[1], zip(cached_prefix, filled.prefix[:-1], strict=False))
        cached = sum(1 for _ in common)
        return EncodedRequest(
            filled.prefix, documents, frozenset(truncated), chunks if split else None, cached, query_truncated
        )

    def _join_tail(self, documents: list[list[int]], texts: dict[int, str], filled: _Filled) -> None:
        """Encode whole documents again with the text after them, whose start may merge with their end."""
        joined = self.text_tokenizer.encode_batch_fast(
            [text + filled.tail for text in texts.values()], add_special_tokens=False
        )
        for place, encoding in zip(texts, joined, strict=True):
            joined_ids = encoding.ids + filled.suffix
            if len(filled.prefix) + len(joined_ids) <= self.max_seq_length:
                documents[place] = joined_ids

    def _filled(self, request: RerankRequest) -> tuple[_Filled, bool]:
        """Return the prompt around the documents, and whether the query in it is truncated.

        Raises:
            InvalidRequestError: it leaves no room for a document.
        """
        query = printable(request.query)
        filled = self._fill(request.instruction, query)
        if filled.size < self.max_seq_length:
            return filled, False
        limit = (self.max_seq_length - self._fill(request.instruction, "").size) // 2
        if limit < _MIN_QUERY_TOKENS:
            raise InvalidRequestError(
                f"prompt and instruction leave no room for a query and a document in {self.max_seq_length} tokens; "
                f"shorten the instruction, or raise MAX_SEQ_LENGTH where the model allows more"
            )
        if not request.truncate_query:
            where = "" if request.query_index is None else f"query[{request.query_index}]: "
            raise InvalidRequestError(
                f"{where}the query and instruction leave no room for a document: they and the prompt take more than "
                f"{self.max_seq_length - 1} of {self.max_seq_length} tokens; shorten the query, send truncate: true to "
                f"have it truncated, or raise MAX_SEQ_LENGTH where the model allows more"
            )
        # Encoded again as text, so that the result is the prompt of a shorter query, token for token.
        start = query[: _character(self._encode_start([" " + query], limit, offsets=True)[0], limit, 1)]
        return self._fill(request.instruction, start), True

    def _fill(self, requested: str | None, query: str) -> _Filled:
        instruction = self.instruction if requested is None else requested
        frame = self._frames[self.template.parts(instruction)]
        texts = {Slot.INSTRUCTION: printable(instruction or ""), Slot.QUERY: query}
        tail = fill(frame.tail, texts)
        suffix = self._encode_pieces(frame.suffix, texts)
        return _Filled(
            self._encode_pieces(frame.head, texts),
            frame.lead,
            self._encode_text(frame.lead.rstrip(" ")),
            tail,
            self._encode_text(tail) + suffix if tail else suffix,
            suffix,
        )

    def _encode_pieces(self, pieces: Sequence[list[int] | Parts], texts: Mapping[Slot, str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += piece if isinstance(piece, list) else self._encode_text(fill(piece, texts))
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Tokens of a text: all of them, or more than fit into a prompt."""
        return self._encode_start([text], max(self.max_seq_length, _MAX_STATIC_PREFIX))[0].ids

    def _encode_start(self, texts: Sequence[str], wanted: int, *, offsets: bool = False) -> list[Encoding]:
        """Tokens of each text: all of them, or at least the first `wanted + 1` if there are more.

        Tokenising ten million characters takes a minute, and only the start matters. So a text is first shortened to a
        likely length, and tokenised again at twice that length only if it gave too few tokens.
        `offsets`: record each token's characters.
        """
        encode = self.text_tokenizer.encode_batch if offsets else self.text_tokenizer.encode_batch_fast
        encodings: dict[int, Encoding] = {}
        limit = (wanted + 1) * _CHARACTERS_PER_TOKEN
        enough = (wanted + 1) * self.max_token_characters
        pending = list(range(len(texts)))
        while pending:
            shortened = [texts[i][:limit] for i in pending]
            encodings |= zip(pending, encode(shortened, add_special_tokens=False), strict=True)
            if limit >= enough:
                break
            pending = [
                i for i in pending if len(texts[i]) > limit and len(encodings[i]) - self._unsure_tokens <= wanted
            ]
            limit *= 2
        return [encodings[i] for i in range(len(texts))]


def _character(encoding: Encoding, token: int, lead: int) -> int:
    """Index in the document of the first character of a token; `lead`: characters encoded before the document."""
    characters = encoding.token_to_chars(token)
    return max(0, characters[0] - lead) if characters else 0
