"""The Qwen3-Reranker prompt, token for token, cut where prefix sharing needs it.

Source: the transformers sample of the Qwen3-Reranker model card. The card tokenises `<Instruct>...<Document>: {text}`
in one piece; the Qwen pre-tokenizer never merges the `:` of `<Document>:` with the space behind it, so the piece can be
split there without changing a token (tests/engine/test_prompt.py proves it on random text).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import takewhile

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from reranker.errors import InvalidRequestError, ModelLoadError
from reranker.request.template import SUFFIX as SUFFIX
from reranker.request.template import SYSTEM as SYSTEM
from reranker.text import printable
from reranker.types import MAX_CHUNKS, EncodedRequest, RerankRequest

logger = logging.getLogger(__name__)

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

# A text is first tried at so many characters per wanted token (English has about 4.5), then at twice as many ...
_CHARACTERS_PER_TOKEN = 4
# Tokens near the end of a cut text may differ from those of the whole text: so many are not trusted.
_UNSURE_TOKENS = 32
# Of a default instruction of many pages the start is kept: 4B needs 0.3 MB a token in float32.
_MOST_PREAMBLE = 512
_CLOSING = "\n<Document>:"
QWEN3_TOKENS = frozenset(
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>".split()
)
"""The added tokens of every Qwen3 checkpoint: each could end a turn or answer for the model."""
# The least that is left of a truncated query; an instruction that leaves less is itself too long.
_MIN_QUERY_TOKENS = 8


class Prompt:
    """Builds the token ids of a request.

    User text is encoded with a copy of the tokenizer whose added tokens are removed, so that `<|im_end|>` or `<think>`
    inside a query or a document is ordinary text; ordinary text gets identical ids.

    Args:
        tokenizer: the tokenizer of a Qwen3-Reranker checkpoint (a fast one).
        max_seq_length: tokens of prefix, document and suffix together.
        instruction: used when a request brings none.

    Raises:
        ModelLoadError: the tokenizer lacks "yes" and "no" or the chat tokens, or control tokens survive in user text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_seq_length: int = 8192, instruction: str = INSTRUCTION
    ) -> None:
        self.instruction = instruction
        self.max_seq_length = max_seq_length
        self.plain = _without_added_tokens(tokenizer)
        self.system = self._control(tokenizer, SYSTEM)
        self.suffix = self._control(tokenizer, SUFFIX)
        self.yes, self.no = (self._answer(tokenizer, word) for word in ("yes", "no"))
        self.longest_entry = max(map(len, self.plain.get_vocab()))
        """Characters that one token can stand for at the most (byte-level entries: at most one character a byte)."""
        opening = self._bounded([_opening(instruction)], _MOST_PREAMBLE)[0].ids
        self.static_prefix = (self.system + opening)[:_MOST_PREAMBLE]
        """With which every prompt of the default instruction begins; one of another instruction shares its start."""

    @staticmethod
    def _control(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids:
            raise ModelLoadError("the tokenizer has no <|im_start|>/<|im_end|> tokens: not a Qwen3-Reranker checkpoint")
        return ids

    @staticmethod
    def _answer(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
        token = tokenizer.convert_tokens_to_ids(word)  # as the card does: the word may not begin a text
        if not isinstance(token, int) or token == tokenizer.unk_token_id:
            raise ModelLoadError(f"the tokenizer has no token {word!r}: not a Qwen3-Reranker checkpoint")
        return token

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer for which the pieces of a prompt are not the tokens of the whole.

        Raises:
            ModelLoadError: its normalizer or pre-tokenizer joins what is encoded apart here.
        """
        for query, document in (("how to compress files", " gzip\n"), ("如何压缩文件", "Ａ gzip"), ("x", "x")):
            opening = f"{_opening(self.instruction)} {query}"
            texts = opening + _CLOSING, " " + document
            pieces = [i for text in texts for i in self.plain.encode(text, add_special_tokens=False).ids]
            if pieces != tokenizer.encode(f"{opening}{_CLOSING} {document}", add_special_tokens=False):
                raise ModelLoadError(
                    "the tokenizer gives a prompt other tokens than a Qwen3-Reranker's (look at normalizer and "
                    "pre_tokenizer in tokenizer.json): use the original's tokenizer"
                )

    def encode(self, request: RerankRequest, kept: Sequence[int] = ()) -> EncodedRequest:
        """Tokenise a request; documents that do not fit are cut from the right, the suffix always stays.

        A document has room for what prefix and suffix leave of `max_seq_length`, or for `max_tokens_per_doc` tokens
        where that is less. With `max_chunks_per_doc` a longer one becomes consecutive windows of that many tokens, the
        last one shorter, each behind the same prefix; what is behind the last allowed window is cut. `kept`: the tokens
        whose keys and values the model keeps; as many as the prefix begins with need not be computed.

        With `truncate_query` a query that leaves no room for a document is truncated from the right, to at most half of
        the tokens that prompt and instruction leave, so that documents have the other half. A query that leaves any
        room stays whole. The instruction is never truncated.

        Raises:
            InvalidRequestError: query and instruction leave no room for a document; a document would have to be cut
                and `truncate` is false.
        """
        prefix, query_truncated = self._prefix(request)
        room = self.max_seq_length - len(prefix) - len(self.suffix)
        size = min(room, request.max_tokens_per_doc or room)
        most = size * min(request.max_chunks_per_doc or 1, MAX_CHUNKS)
        split = request.max_chunks_per_doc is not None
        texts = [" " + printable(document) for document in request.documents]
        documents: list[list[int]] = []
        chunks: list[list[int]] = []
        truncated: set[int] = set()
        for i, encoding in enumerate(self._bounded(texts, most, offsets=split)):
            ids = encoding.ids
            cut = len(ids) > most
            if cut and not request.truncate:
                raise InvalidRequestError(
                    f"documents[{request.position(i)}]: longer than the {most} tokens that are read of it; "
                    f"shorten it, or leave truncate out to have it cut"
                )
            if cut:
                truncated.add(i)
            starts = range(0, min(len(ids), most), size)
            documents += [ids[start : start + size] + self.suffix for start in starts]
            if split:
                borders = [_character(encoding, start) for start in starts]
                chunks.append([*borders, _character(encoding, most) if cut else len(texts[i]) - 1])
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(kept, prefix[:-1], strict=False)))
        return EncodedRequest(
            prefix, documents, frozenset(truncated), chunks if split else None, known, query_truncated
        )

    def _prefix(self, request: RerankRequest) -> tuple[list[int], bool]:
        """Return the tokens in front of every document, and whether the query in them is truncated.

        Raises:
            InvalidRequestError: they leave no room for a document.
        """
        opening = _opening(self.instruction if request.instruction is None else request.instruction)
        query = printable(request.query)
        room = self.max_seq_length - len(self.system) - len(self.suffix)
        pair = self._bounded([f"{opening} {query}{_CLOSING}"], room)[0].ids
        if len(pair) < room:
            return self.system + pair, False
        limit = (room - len(self._bounded([opening + _CLOSING], room)[0])) // 2
        if limit < _MIN_QUERY_TOKENS:
            raise InvalidRequestError(
                f"the instruction leaves no room for a query and a document in {self.max_seq_length} tokens; "
                f"shorten the instruction or raise MAX_SEQ_LENGTH"
            )
        if not request.truncate_query:
            raise InvalidRequestError(
                f"the query and instruction leave no room for a document: they and the prompt take more than "
                f"{self.max_seq_length - 1} of {self.max_seq_length} tokens; shorten the query, send truncate: true to "
                f"have it truncated, or raise MAX_SEQ_LENGTH"
            )
        # As text, so that the prompt is the card's prompt for a shorter query, token for token.
        start = query[: _character(self._bounded([" " + query], limit, offsets=True)[0], limit)]
        return self.system + self._bounded([f"{opening} {start}{_CLOSING}"], room)[0].ids, True

    def _bounded(self, texts: Sequence[str], wanted: int, *, offsets: bool = False) -> list[Encoding]:
        """Tokens of each text: all of them, or at least the first `wanted + 1` when there are more.

        Tokenising a ten-million-character text takes a minute; only its beginning matters. A text is cut to what is
        likely enough, and cut later only where that gave too few tokens. `offsets`: know each token's characters.
        """
        encode = self.plain.encode_batch if offsets else self.plain.encode_batch_fast
        done: dict[int, Encoding] = {}
        limit = (wanted + 1) * _CHARACTERS_PER_TOKEN
        most = (wanted + 1) * self.longest_entry
        todo = list(range(len(texts)))
        while todo:
            cut = [texts[i][:limit] for i in todo]
            short: list[int] = []
            for i, encoding in zip(todo, encode(cut, add_special_tokens=False), strict=True):
                done[i] = encoding
                whole = len(texts[i]) <= limit or limit >= most
                if not whole and len(encoding) - _UNSURE_TOKENS <= wanted:
                    short.append(i)
            todo, limit = short, limit * 2
        return [done[i] for i in range(len(texts))]


def _opening(instruction: str) -> str:
    return f"<Instruct>: {printable(instruction)}\n<Query>:"


def _character(encoding: Encoding, token: int) -> int:
    """Where a token of " " + document begins in the document."""
    characters = encoding.token_to_chars(token)
    return max(0, characters[0] - 1) if characters else 0


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the tokenizer that knows ordinary text only, and words that a fine-tune added."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelLoadError("the model folder has no tokenizer.json: download the whole checkpoint again")
    description = json.loads(backend.to_str())
    tokens = description["added_tokens"]
    words = [token for token in tokens if token["content"] not in QWEN3_TOKENS and not token["special"]]
    control = {token["content"]: token["id"] for token in tokens if token not in words}
    if others := sorted(set(control) - set(QWEN3_TOKENS)):
        logger.warning("special tokens of the checkpoint are plain text in queries and documents: %s", others[:3])
    description |= {"truncation": None, "padding": None}
    if words:  # a fine-tune has learnt them: only what could steer the prompt is text
        for token in tokens:
            token["special"] = token not in words
    else:
        description["added_tokens"] = []
    plain = Tokenizer.from_str(json.dumps(description))
    plain.encode_special_tokens = True
    survivors = sorted(text for text, i in control.items() if i in plain.encode(text, add_special_tokens=False).ids)
    if survivors:
        raise ModelLoadError(f"control tokens are ordinary vocabulary here and could be forged: {survivors[:3]}")
    return plain
