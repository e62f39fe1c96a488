"""The Qwen3-Reranker prompt, and its removal from texts that a client has formatted with it.

Source of the prompt: the transformers sample of the Qwen3-Reranker model card. The clients that vLLM and vllm-ascend
publish for this model format the same prompt themselves, in two parts:

    query      SYSTEM + "<Instruct>: {instruction}\\n<Query>: {query}\\n"
    document   "<Document>: {document}" + SUFFIX
"""

from __future__ import annotations

SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

_QUERY_HEAD = SYSTEM + "<Instruct>: "
_QUERY = "\n<Query>: "
_DOCUMENT_HEAD = "<Document>: "
_LIKELY = "<|im_start|>", "<Instruct>:"
"""Starts of texts in any prompt template."""


def unwrap_query(text: str) -> tuple[str, str] | None:
    """Return instruction and query inside the published template; None if `text` is not exactly that template."""
    if not (text.startswith(_QUERY_HEAD) and text.endswith("\n")):
        return None
    instruction, separator, query = text[len(_QUERY_HEAD) : -1].partition(_QUERY)
    return (instruction, query) if separator else None


def unwrap_document(text: str) -> str:
    """Return the document inside the published template; `text` itself if it is not exactly that template."""
    if text.startswith(_DOCUMENT_HEAD) and text.endswith(SUFFIX):
        return text[len(_DOCUMENT_HEAD) : -len(SUFFIX)]
    return text


def looks_wrapped(text: str) -> bool:
    """Whether a text begins like a prompt template of this model."""
    return text.lstrip().startswith(_LIKELY) if text[:1].isspace() else text.startswith(_LIKELY)
