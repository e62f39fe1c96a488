"""The Qwen3-Reranker prompt, token for token, cut where prefix sharing needs it.

Source: the transformers sample of the Qwen3-Reranker model card. The card tokenises `<Instruct>...<Document>: {text}`
in one piece; the Qwen pre-tokenizer never merges the `:` of `<Document>:` with the space behind it, so the piece can be
split there without changing a token (tests/test_prompt.py proves it on random text).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from reranker.engine.text import printable
from reranker.errors import InvalidRequestError, ModelLoadError
from reranker.types import EncodedRequest, RerankRequest

SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

# A text is first tried at so many characters per wanted token (English has about 4.5), then at twice as many ...
_CHARACTERS_PER_TOKEN = 4
# Tokens near the end of a cut text may differ from those of the whole text: so many are not trusted.
_UNSURE_TOKENS = 32


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
        self.yes, self.no = (self._single(tokenizer, word) for word in ("yes", "no"))
        self.longest_entry = max(map(len, self.plain.get_vocab()))
        """Characters that one token can stand for at the most (byte-level entries: at most one character a byte)."""

    @staticmethod
    def _control(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids:
            raise ModelLoadError("the tokenizer has no <|im_start|>/<|im_end|> tokens: not a Qwen3-Reranker checkpoint")
        return ids

    @staticmethod
    def _single(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ModelLoadError(
                f"the tokenizer splits {word!r} into {len(ids)} tokens: not a Qwen3-Reranker checkpoint"
            )
        return int(ids[0])

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Tokenise a request; documents that do not fit are cut from the right, the suffix always stays.

        Raises:
            InvalidRequestError: query and instruction leave no room for a document.
        """
        instruction = self.instruction if request.instruction is None else request.instruction
        pair = f"<Instruct>: {printable(instruction)}\n<Query>: {printable(request.query)}\n<Document>:"
        room = self.max_seq_length - len(self.system) - len(self.suffix)
        prefix = self.system + self._bounded([pair], room)[0]
        room = self.max_seq_length - len(prefix) - len(self.suffix)
        if room < 1:
            raise InvalidRequestError(
                f"the query and instruction leave no room for a document: they and the prompt take more than "
                f"{self.max_seq_length - 1} of {self.max_seq_length} tokens; shorten the query or raise MAX_SEQ_LENGTH"
            )
        documents = self._bounded([" " + printable(document) for document in request.documents], room)
        truncated = 0
        for ids in documents:
            if len(ids) > room:
                truncated += 1
                del ids[room:]
            ids += self.suffix
        return EncodedRequest(prefix, documents, truncated)

    def _bounded(self, texts: Sequence[str], wanted: int) -> list[list[int]]:
        """Ids of each text: all of them, or at least the first `wanted + 1` when there are more.

        Tokenising a ten-million-character text takes a minute; only its beginning matters. A text is cut to what is
        likely enough, and cut later only where that gave too few tokens.
        """
        ids: list[list[int]] = [[]] * len(texts)
        limit = (wanted + 1) * _CHARACTERS_PER_TOKEN
        most = (wanted + 1) * self.longest_entry
        todo = list(range(len(texts)))
        while todo:
            cut = [texts[i][:limit] for i in todo]
            encodings = self.plain.encode_batch_fast(cut, add_special_tokens=False)
            short: list[int] = []
            for i, encoding in zip(todo, encodings, strict=True):
                ids[i] = encoding.ids
                whole = len(texts[i]) <= limit or limit >= most
                if not whole and len(ids[i]) - _UNSURE_TOKENS <= wanted:
                    short.append(i)
            todo, limit = short, limit * 2
        return ids


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer that knows ordinary text only."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelLoadError("the model folder has no tokenizer.json: download the whole checkpoint again")
    description = json.loads(backend.to_str())
    added = {token["content"]: token["id"] for token in description["added_tokens"]}
    description |= {"added_tokens": [], "truncation": None, "padding": None}
    plain = Tokenizer.from_str(json.dumps(description))
    survivors = sorted(text for text, i in added.items() if i in plain.encode(text, add_special_tokens=False).ids)
    if survivors:
        raise ModelLoadError(f"control tokens are ordinary vocabulary here and could be forged: {survivors[:3]}")
    return plain
