"""Read the files of the sentence-transformers layout: which words are the answer, which prompt, which instruction.

Source: sentence-transformers' CrossEncoder, whose LogitScore module takes logit(true) - logit(false) of a prompt that
the folder's chat template renders from the roles system (the instruction), query and document.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reranker.engine.checkpoint.config import first_line, read_json
from reranker.errors import ModelLoadError
from reranker.request.template import SUFFIX, SYSTEM

logger = logging.getLogger(__name__)

_INSTRUCTION, _QUERY, _DOCUMENT = "\n sentinel instruction ", " sentinel <query>\n", " sentinel &amp; document "
"""With outer white space: a template that trims its texts renders another prompt."""
_EMBEDDING = ("Pooling", "Normalize", "WordEmbeddings", "StaticEmbedding")


def default_instruction(path: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the instruction that the folder names for requests without one; None where it names none.

    Raises:
        ModelLoadError: the folder describes another answer or another prompt than this service computes.
    """
    scored = _check_modules(path, tokenizer)
    template = _check_template(path, tokenizer, scored)
    file = path / "config_sentence_transformers.json"
    settings = read_json(file) if file.is_file() else {}
    if settings.get("model_type") == "SentenceTransformer" or settings.get("similarity_fn_name"):
        raise ModelLoadError(f"{path} is an embedding model ({file.name}), and gives no relevance: use a reranker")
    activation = str(settings.get("activation_fn") or "Sigmoid").rpartition(".")[2]
    if activation not in ("Sigmoid", "Identity"):
        logger.warning("the activation %s of %s is not used: scores are sigmoid(yes - no)", activation[:40], path)
    transformer = path / "sentence_bert_config.json"
    if transformer.is_file() and read_json(transformer).get("do_lower_case"):
        raise ModelLoadError(f"{transformer} sets do_lower_case, which is not done here: remove it")
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if name is None:
        return template
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise ModelLoadError(f"{file} has no prompt for its default_prompt_name: add it to prompts, or remove the name")
    return prompt if prompt.strip() else template


def _check_modules(path: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Refuse an embedding model, a trained head, and other answers than yes and no; True where LogitScore is named."""
    answers = sorted(path.glob("*_LogitScore/config.json"))
    pooling = next((name for name in _EMBEDDING for _ in path.glob(f"*_{name}")), "")
    file = path / "modules.json"
    above = path.parent / "modules.json"
    if above.is_file() and any(module.get("path") == path.name for module in _modules(above)):
        raise ModelLoadError(f"{path} is a part of {path.parent}, whose modules.json says how it is scored: use that")
    for module in _modules(file) if file.is_file() else []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        folder = path / str(module.get("path") or "")
        if kind in _EMBEDDING:
            pooling = kind
        elif kind == "LogitScore":
            answers.append(folder / "config.json")
        elif kind != "Transformer":
            raise ModelLoadError(f"{file} names the module {kind[:40]!r}, which is not computed here")
        elif folder != path:
            raise ModelLoadError(f"{path} keeps its weights in {folder.name}: move the files of {folder} into {path}")
    if pooling:
        raise ModelLoadError(
            f"{path} is an embedding model ({pooling} in modules.json or beside it), and gives no relevance: use a "
            f"reranker, such as Qwen/Qwen3-Reranker-4B"
        )
    for answer in answers:
        _check_answers(answer, tokenizer)
    return bool(answers)


def _modules(file: Path) -> list[dict[str, object]]:
    modules = read_json(file, list)
    if not all(isinstance(module, dict) for module in modules):
        raise ModelLoadError(f"{file} is not a list of modules: download the checkpoint again")
    return list(modules)


def _check_answers(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = read_json(file)
    expected = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    actual = [settings.get(name) for name in ("true_token_id", "false_token_id")]
    if actual != expected:
        raise ModelLoadError(
            f"{file} scores by the tokens {actual[0]} and {actual[1]}, which are not this tokenizer's yes "
            f"({expected[0]}) and no ({expected[1]}): only yes minus no is computed here"
        )


def _check_template(path: Path, tokenizer: PreTrainedTokenizerBase, scored: bool) -> str | None:
    """Return the instruction in a chat template of the card's prompt; None where there is none, or a generic one.

    A template that takes a query and a document is the prompt that the checkpoint was trained with, and so is every
    template beside a LogitScore module. A generic one, as fine-tuning tools leave beside the weights, knows neither of
    the two roles.

    Raises:
        ModelLoadError: the template renders another prompt.
    """
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        roles = ("query", "document")
        if not isinstance(template, str) or not (
            scored or all(re.search(rf"['\"]{role}['\"]", template) for role in roles)
        ):
            continue
        if _render(path, tokenizer, template, _INSTRUCTION) != _card(_INSTRUCTION):
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
    """Render a prompt in transformers' sandbox; None where a template insists on an instruction."""
    messages = [{"role": "query", "content": _QUERY}, {"role": "document", "content": _DOCUMENT}]
    if instruction is not None:
        messages.insert(0, {"role": "system", "content": instruction})
    try:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise anything
        if instruction is None:
            return None
        raise ModelLoadError(f"the chat template in {path} cannot be rendered: {first_line(error)}") from error
    return str(rendered)
