"""Read the sentence-transformers files of a checkpoint: the words that are scored, the prompt, the instruction.

Source: sentence-transformers' CrossEncoder. Its LogitScore module takes logit(true) - logit(false), or logit(true)
alone; the folder's chat template renders the prompt from the roles system (the instruction), query and document.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from reranker.engine.checkpoint.chat_template import read_template, section
from reranker.engine.checkpoint.files import AGAIN, RERANKER, read_json, refuse_if
from reranker.engine.template import Template
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

_EMBEDDING = ("Pooling", "Normalize", "WordEmbeddings", "StaticEmbedding")
"""Modules that only embedding models have."""
_NO_LIMIT = 10**9
"""Tokenizers write a length above it for none."""


class Answers(NamedTuple):
    """Token ids of the words whose logits are the score: true - false, or true alone."""

    true: int
    false: int | None


class Layout(NamedTuple):
    """What the files say; None: nothing."""

    folder: Path
    """The folder whose modules have the answers."""
    answers: Answers | None
    template: Template | None
    instruction: str | None
    """The default instruction."""
    max_length: int | None
    """Tokens at which sentence-transformers truncates a prompt."""


def read_layout(
    folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase, control_tokens: frozenset[str], *, pairs: bool = False
) -> Layout:
    """Read the layout of a checkpoint.

    Args:
        folders: its folders; a file of the first is read in place of one of the second.
        tokenizer: its tokenizer, with its chat template.
        control_tokens: the added tokens of the model family.
        pairs: whether the model reads pairs of texts, and no prompt.

    Raises:
        ModelLoadError: the folder describes a score or a prompt that is not computed here; for pairs, any prompt.
    """
    path = next((folder for folder in folders if _has_modules(folder)), folders[-1])
    answers = _read_answers(path)
    file, transformer = (
        next((folder / name for folder in folders if (folder / name).is_file()), path / name)
        for name in ("config_sentence_transformers.json", "sentence_bert_config.json")
    )
    settings = read_json(file) if file.is_file() else {}
    options = read_json(transformer) if transformer.is_file() else {}
    embedding = settings.get("model_type") == "SentenceTransformer" or settings.get("similarity_fn_name")
    refuse_if(embedding, f"{file.parent} is an embedding model ({file.name}), which {RERANKER}")
    warn_of_activation(file.parent, settings.get("activation_fn"))
    refuse_if(options.get("do_lower_case"), f"{transformer} sets do_lower_case, which is not supported: remove it")
    bare = options.get("modality_config") and "message" not in options["modality_config"]
    problem = f"{transformer} scores texts without a prompt (no message in modality_config), which is not served"
    refuse_if(bare and not pairs, f"{problem}: add the entry, and the prompt as chat_template.jinja")
    own = Path(tokenizer.name_or_path)
    template = read_template(own, tokenizer, control_tokens, options, required=answers is not None)
    instruction = _default_prompt(file, settings)
    if pairs:
        given = section(options, "processing_kwargs", "chat_template").get("chat_template")
        jinja = own / "chat_template.jinja"
        source = transformer if given else jinja if jinja.is_file() else own / "tokenizer_config.json"
        for part, what in (
            (template, f"{source} has a prompt (chat_template)"),
            (instruction, f"{file} has an instruction (default_prompt_name)"),
            (answers, f"{path} has words to score (true_token_id in the config.json of LogitScore)"),
        ):
            refuse_if(part is not None, f"{what}, but an encoder reads pairs: remove it")
    return Layout(path, answers, template, instruction, _max_length(tokenizer, options))


def refuse_dense(path: Path) -> None:
    """Refuse an embedding model, or a reranker like it, whose last layers are modules of sentence-transformers."""
    dense = {"Pooling", "Dense"} <= {kind for kind, _ in _modules(path)}
    problem = (
        f"{path} has Pooling and Dense in modules.json: a score head in these modules (ettin-reranker) is not read"
    )
    refuse_if(dense, f"{problem}, and an embedding model {RERANKER}")


def warn_of_activation(folder: Path, name: object) -> None:
    """Warn of an activation that sentence-transformers would apply to a logit, if it is neither of the usual two."""
    activation = str(name or "Sigmoid").rpartition(".")[2]
    if activation not in ("Sigmoid", "Identity"):
        logger.warning("the activation %s of %s is ignored: scores are sigmoid(logit)", activation[:40], folder)


def _max_length(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> int | None:
    given = [section(options, "processing_kwargs", name).get("max_length") for name in ("chat_template", "text")]
    limits = [*given, options.get("max_seq_length"), tokenizer.model_max_length]
    numbers = [limit for limit in limits if isinstance(limit, int | float) and not isinstance(limit, bool)]
    return min((int(limit) for limit in numbers if 0 < limit < _NO_LIMIT), default=None)


def _default_prompt(file: Path, settings: dict[str, Any]) -> str | None:
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if name is None:
        return None
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise ModelLoadError(f"{file} has no prompt for its default_prompt_name: add it to prompts, or remove the name")
    return prompt if prompt.strip() else None


def _has_modules(path: Path) -> bool:
    return (path / "modules.json").is_file() or any(path.glob("*_LogitScore"))


def _read_answers(path: Path) -> Answers | None:
    """Return the words of the LogitScore module; refuse an embedding model and other modules."""
    path = path.absolute()  # "." is its own parent
    above = any(folder == path for _, folder in _modules(path.parent))
    refuse_if(above, f"{path} is a part of {path.parent}, whose modules.json says how it is scored: use that folder")
    modules = _modules(path)
    kinds = [kind for kind, _ in modules]
    refuse_dense(path)
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
    found = {_answers(file) for file in files}
    refuse_if(len(found) > 1, f"{path} has LogitScore modules with different tokens: remove the wrong one")
    return found.pop() if found else None


def _modules(path: Path) -> list[tuple[str, Path]]:
    """Return the kind and the folder of each module in modules.json; nothing without that file."""
    file = path / "modules.json"
    modules = read_json(file, list) if file.is_file() else []
    broken = not all(isinstance(module, dict) for module in modules)
    refuse_if(broken, f"{file} is not a list of modules: {AGAIN}")
    return [(str(m.get("type", "")).rpartition(".")[2], path / str(m.get("path") or "")) for m in modules]


def _answers(file: Path) -> Answers:
    settings = read_json(file)
    true, false = settings.get("true_token_id"), settings.get("false_token_id")
    right = type(true) is int and (false is None or type(false) is int) and true != false and min(true, false or 0) >= 0
    refuse_if(not right, f"{file} has the tokens true_token_id={true} and false_token_id={false}: {AGAIN}")
    name = settings.get("module_input_name", "causal_logits")
    refuse_if(name != "causal_logits", f"{file} scores {str(name)[:40]!r}, not causal_logits: it is not computed here")
    return Answers(true, false)
