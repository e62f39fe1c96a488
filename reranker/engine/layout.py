"""Read the files of the sentence-transformers layout: which words are the answer, which prompt, which instruction.

Source: sentence-transformers' CrossEncoder, whose LogitScore module takes logit(true) - logit(false) of a prompt that
the folder's chat template renders from the roles system (the instruction), query and document.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from reranker.engine.checkpoint import read_json
from reranker.engine.prompt import SUFFIX, SYSTEM
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

_INSTRUCTION, _QUERY, _DOCUMENT = "sentinel instruction", "sentinel query", "sentinel document"
_EMBEDDING = ("Pooling", "Normalize", "WordEmbeddings", "StaticEmbedding")


def default_instruction(path: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The instruction that the folder names for requests without one; None where it names none.

    Raises:
        ModelLoadError: the folder describes another answer or another prompt than this service computes.
    """
    _check_modules(path, tokenizer)
    template = _check_template(path, tokenizer)
    file = path / "config_sentence_transformers.json"
    settings = read_json(file) if file.is_file() else {}
    activation = str(settings.get("activation_fn") or "Sigmoid").rpartition(".")[2]
    if activation not in ("Sigmoid", "Identity"):
        logger.warning("the activation %s of %s is not used: scores are sigmoid(yes - no)", activation[:40], path)
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if name is None:
        return template
    prompt = prompts.get(name) if isinstance(prompts, dict) else None
    if not isinstance(prompt, str):
        raise ModelLoadError(f"{file} has no prompt for its default_prompt_name: add it to prompts, or remove the name")
    return prompt if prompt.strip() else template


def _check_modules(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an embedding model, a trained head, and other answers than yes and no."""
    file = path / "modules.json"
    if not file.is_file():
        return
    for module in read_json_list(file):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind in _EMBEDDING:
            raise ModelLoadError(
                f"{path} is an embedding model ({kind} in modules.json), and gives no relevance: use a reranker, such "
                f"as Qwen/Qwen3-Reranker-4B"
            )
        if kind not in ("Transformer", "LogitScore"):
            raise ModelLoadError(f"{file} names the module {kind[:40]!r}, which is not computed here")
        folder = path / str(module.get("path") or "")
        if kind == "LogitScore":
            _check_answers(folder / "config.json", tokenizer)
        elif folder != path:
            raise ModelLoadError(f"{path} keeps its weights in {folder.name}: move the files of {folder} into {path}")


def _check_answers(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = read_json(file)
    wanted = tuple(tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "no"))
    found = tuple([settings.get(name)] for name in ("true_token_id", "false_token_id"))
    if found != wanted:
        raise ModelLoadError(
            f"{file} scores by the tokens {found[0][0]} and {found[1][0]}, which are not this tokenizer's yes "
            f"{wanted[0]} and no {wanted[1]}: only yes minus no is computed here"
        )


def read_json_list(file: Path) -> list[dict[str, Any]]:
    """modules.json: a list of objects.

    Raises:
        ModelLoadError: it is something else.
    """
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is not JSON: download the checkpoint again") from error
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ModelLoadError(f"{file} is not a list of modules: download the checkpoint again")
    return value


def _check_template(path: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The instruction in a chat template of the card's prompt; None where there is none, or a generic template.

    A template that takes a query and a document is the prompt that the checkpoint was trained with. A generic one, as
    fine-tuning tools leave beside the weights, knows neither of the two roles.
    """
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if not isinstance(template, str) or not all(
            re.search(rf"['\"]{role}['\"]", template) for role in ("query", "document")
        ):
            continue
        prompt = _render(path, tokenizer, template, _INSTRUCTION)
        if prompt != _card(_INSTRUCTION):
            raise ModelLoadError(
                f"the chat template in {path} renders another prompt than Qwen3-Reranker's, and would be ignored: "
                f"use the original's chat_template.jinja if the model was trained with the original's prompt"
            )
        before, after = _card("\0").split("\0")
        alone = _render(path, tokenizer, template, None)
        if alone and alone.startswith(before) and alone.endswith(after):
            return alone[len(before) : len(alone) - len(after)] or None
    return None


def _card(instruction: str) -> str:
    return f"{SYSTEM}<Instruct>: {instruction}\n<Query>: {_QUERY}\n<Document>: {_DOCUMENT}{SUFFIX}"


def _render(path: Path, tokenizer: PreTrainedTokenizerBase, template: str, instruction: str | None) -> str | None:
    """The prompt that transformers' sandbox renders; None where a template insists on an instruction."""
    messages = [{"role": "query", "content": _QUERY}, {"role": "document", "content": _DOCUMENT}]
    if instruction is not None:
        messages.insert(0, {"role": "system", "content": instruction})
    try:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise whatever it likes
        if instruction is None:
            return None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(f"the chat template in {path} cannot be rendered: {reason[0][:200]}") from error
    return str(rendered)
