"""The text of the Qwen3-Reranker prompt, and the texts that already wear it.

Source of the prompt: the transformers sample of the Qwen3-Reranker model card. Source of the wrapper: the clients that
vLLM and vllm-ascend publish for this model format the same prompt themselves, in halves:

    query      SYSTEM + "<Instruct>: {instruction}\\n<Query>: {query}\\n"
    document   "<Document>: {document}" + SUFFIX
"""

from __future__ import annotations

from typing import NamedTuple

SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

_QUERY_HEAD = SYSTEM + "<Instruct>: "
_QUERY = "\n<Query>: "
_DOCUMENT_HEAD = "<Document>: "
_LIKELY = "<|im_start|>", "<Instruct>:"
"""Starts of a text that a client formatted with some prompt template."""


class Wrapped(NamedTuple):
    """The texts inside a query that wears the published template."""

    instruction: str
    query: str


def unwrap_query(text: str) -> Wrapped | None:
    """Return what the published template wraps; None where `text` is not exactly that template."""
    if not (text.startswith(_QUERY_HEAD) and text.endswith("\n")):
        return None
    instruction, found, query = text[len(_QUERY_HEAD) : -1].partition(_QUERY)
    return Wrapped(instruction, query) if found else None


def unwrap_document(text: str) -> str:
    """Return the document inside the published template; a text that does not wear exactly that is returned as is."""
    if text.startswith(_DOCUMENT_HEAD) and text.endswith(SUFFIX):
        return text[len(_DOCUMENT_HEAD) : -len(SUFFIX)]
    return text


def looks_wrapped(text: str) -> bool:
    """Whether a text begins as prompt templates of this model do."""
    return text.lstrip().startswith(_LIKELY) if text[:1].isspace() else text.startswith(_LIKELY)
