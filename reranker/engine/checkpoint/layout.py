"""Read the sentence-transformers files of a checkpoint: the words that are scored, the prompt, the instruction.

Source: sentence-transformers' CrossEncoder, whose LogitScore module takes logit(true) - logit(false) of a prompt that
the folder's chat template renders from the roles system (the instruction), query and document.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reranker.engine.checkpoint.files import AGAIN, RERANKER, first_line, read_json, refuse_if
from reranker.engine.families.base import Family
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

_INSTRUCTION, _QUERY, _DOCUMENT = "\n sentinel instruction ", " sentinel <query>\n", " sentinel &amp; document "
"""With outer white space, so that a template that trims its texts renders another prompt."""
_EMBEDDING = ("Pooling", "Normalize", "WordEmbeddings", "StaticEmbedding")
"""Modules that only embedding models have."""


def default_instruction(family: Family) -> str | None:
    """Return the instruction that the folder names for requests without one; None if it names none.

    Raises:
        ModelLoadError: the folder describes another score or another prompt than this service computes.
    """
    path = family.checkpoint.path
    template = _check_template(family, has_answers=_check_modules(family))
    file, transformer = path / "config_sentence_transformers.json", path / "sentence_bert_config.json"
    settings = read_json(file) if file.is_file() else {}
    embedding = settings.get("model_type") == "SentenceTransformer" or settings.get("similarity_fn_name")
    refuse_if(embedding, f"{path} is an embedding model ({file.name}), which {RERANKER}")
    activation = str(settings.get("activation_fn") or "Sigmoid").rpartition(".")[2]
    if activation not in ("Sigmoid", "Identity"):
        used = " - ".join(family.answers)
        logger.warning("the activation %s of %s is ignored: scores are sigmoid(%s)", activation[:40], path, used)
    lower = transformer.is_file() and read_json(transformer).get("do_lower_case")
    refuse_if(lower, f"{transformer} sets do_lower_case, which is not supported: remove it")
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if name is None:
        return template
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise ModelLoadError(f"{file} has no prompt for its default_prompt_name: add it to prompts, or remove the name")
    return prompt if prompt.strip() else template


def _check_modules(family: Family) -> bool:
    """Refuse an embedding model, a trained head, and other words than the family's; True if there is a LogitScore."""
    path = family.checkpoint.path.absolute()  # "." is its own parent
    above = any(folder == path for _, folder in _modules(path.parent))
    refuse_if(above, f"{path} is a part of {path.parent}, whose modules.json says how it is scored: use that folder")
    modules = _modules(path)
    kinds = [kind for kind, _ in modules]
    embedding = next((kind for kind in _EMBEDDING if kind in kinds or any(path.glob(f"*_{kind}"))), None)
    refuse_if(embedding, f"{path} is an embedding model ({embedding} in modules.json or beside it), which {RERANKER}")
    files = sorted(path.glob("*_LogitScore/config.json"))
    for kind, folder in modules:
        if kind == "LogitScore":
            files.append(folder / "config.json")
        elif kind != "Transformer":
            raise ModelLoadError(f"{path / 'modules.json'} names the module {kind[:40]!r}, which is not computed here")
        elif folder != path:
            raise ModelLoadError(f"{path} keeps its weights in {folder.name}: move the files of {folder} into {path}")
    for file in files:
        _check_answers(file, family.answers)
    return bool(files)


def _modules(path: Path) -> list[tuple[str, Path]]:
    """Return the kind and the folder of each module in modules.json; nothing without that file."""
    file = path / "modules.json"
    modules = read_json(file, list) if file.is_file() else []
    broken = not all(isinstance(module, dict) for module in modules)
    refuse_if(broken, f"{file} is not a list of modules: {AGAIN}")
    return [(str(m.get("type", "")).rpartition(".")[2], path / str(m.get("path") or "")) for m in modules]


def _check_answers(file: Path, answers: Mapping[str, int]) -> None:
    settings = read_json(file)
    tokens = [settings.get(name) for name in ("true_token_id", "false_token_id")]
    words = " and ".join(f"{word} ({token})" for word, token in answers.items())
    problem = f"{file} scores by the tokens {tokens[0]} and {tokens[1]}, not by this tokenizer's {words}"
    refuse_if(tokens != [*answers.values()], f"{problem}: only {' minus '.join(answers)} is computed here")


def _check_template(family: Family, has_answers: bool) -> str | None:
    """Refuse a chat template of another prompt than the family's; return its default instruction, if it has one.

    A template with the roles query and document is the prompt that the checkpoint was trained with, and so is every
    template beside a LogitScore module. Fine-tuning tools leave a generic template beside the weights, which has
    neither role and is ignored.
    """
    path, tokenizer = family.checkpoint.path, family.checkpoint.tokenizer
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if not isinstance(template, str):
            continue
        if not has_answers and not all(re.search(f"['\"]{role}['\"]", template) for role in ("query", "document")):
            continue
        refuse_if(
            _render(path, tokenizer, template, _INSTRUCTION) != family.template.render(_INSTRUCTION, _QUERY, _DOCUMENT),
            f"the chat template in {path} renders another prompt than Qwen3-Reranker's, and would be ignored: use the "
            f"original's chat_template.jinja if the model was trained with the original's prompt",
        )
        before, after = family.template.render("\0", _QUERY, _DOCUMENT).split("\0")
        rendered = _render(path, tokenizer, template, None) or ""
        if rendered.startswith(before) and rendered.endswith(after):
            return rendered[len(before) : len(rendered) - len(after)] or None
    return None


def _render(path: Path, tokenizer: PreTrainedTokenizerBase, template: str, instruction: str | None) -> str | None:
    """Render a prompt in transformers' sandbox; None if the template requires an instruction."""
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
