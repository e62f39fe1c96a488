"""Read the sentence-transformers files of a checkpoint: the words that are scored, the prompt, the instruction.

Source: sentence-transformers' CrossEncoder. Its LogitScore module takes logit(true) - logit(false), or logit(true)
alone; the folder's chat template renders the prompt from the roles system (the instruction), query and document.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from reranker.engine.checkpoint.files import AGAIN, RERANKER, first_line, read_json, refuse_if
from reranker.engine.template import Parts, Slot, Template, text_of
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

_TEXTS = (
    {Slot.INSTRUCTION: "\t an instruction\t", Slot.QUERY: "\t a <query>\t", Slot.DOCUMENT: "\t a &amp; document\t"},
    {Slot.INSTRUCTION: "2nd order", Slot.QUERY: "is it?", Slot.DOCUMENT: "第二个文档 " * 9 + "."},
)
"""A template must treat both alike. The first have outer white space, which a template that trims would remove."""
_ROLES = {Slot.INSTRUCTION: "system", Slot.QUERY: "query", Slot.DOCUMENT: "document"}
_EMBEDDING = ("Pooling", "Normalize", "WordEmbeddings", "StaticEmbedding")
"""Modules that only embedding models have."""
_NOT_RENDERED = {"padding", "truncation", "max_length", "return_tensors", "restore_suffix", "tokenize", "return_dict"}
"""Options that sentence-transformers does not hand to the template."""


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


def read_layout(folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase, control_tokens: frozenset[str]) -> Layout:
    """Read the layout of a checkpoint.

    Args:
        folders: its folders; a file of the first is read in place of one of the second.
        tokenizer: its tokenizer, with its chat template.
        control_tokens: the added tokens of the model family.

    Raises:
        ModelLoadError: the folder describes a score or a prompt that is not computed here.
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
    activation = str(settings.get("activation_fn") or "Sigmoid").rpartition(".")[2]
    if activation not in ("Sigmoid", "Identity"):
        logger.warning("the activation %s of %s is ignored: scores are sigmoid(logit)", activation[:40], file.parent)
    refuse_if(options.get("do_lower_case"), f"{transformer} sets do_lower_case, which is not supported: remove it")
    own = Path(tokenizer.name_or_path)
    template = _read_template(own, tokenizer, control_tokens, options, required=answers is not None)
    return Layout(path, answers, template, _default_prompt(file, settings))


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


def _read_template(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    control_tokens: frozenset[str],
    options: dict[str, Any],
    *,
    required: bool,
) -> Template | None:
    """Return the prompt that the chat template renders from the roles query and document; None if it has no such roles.

    A template beside a LogitScore module must have them. Fine-tuning tools leave a generic template beside the weights,
    which has neither role and is ignored.
    """
    if (source := _source(tokenizer)) is None:
        return None
    if not required and not all(re.search(f"['\"]{role}['\"]", source) for role in ("query", "document")):
        return None
    processing = options.get("processing_kwargs") or {}
    given = processing.get("chat_template") or {} if isinstance(processing, dict) else {}
    values = {name: value for name, value in given.items() if name not in _NOT_RENDERED}
    rendered = _Renderer(path, tokenizer, source, values)
    with_instruction = rendered.parts(instructed=True)
    plain = rendered.parts(instructed=False)
    if with_instruction is None and plain is None:
        raise ModelLoadError(f"the chat template in {path} cannot be rendered: {rendered.error}")
    instruction: str | None = None
    if with_instruction is not None and Slot.INSTRUCTION not in with_instruction:
        with_instruction, plain = None, plain or with_instruction
    if with_instruction is not None and plain is not None:
        instruction = _default_in(with_instruction, plain)
        plain = plain if instruction is None else None
    text = "\0".join(text_of(form) for form in (with_instruction, plain) if form is not None)
    own = {str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) in text}
    return Template(with_instruction, plain, instruction, control_tokens | own, "the chat template of the checkpoint")


def _source(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text of the chat template; of several, the one called default or reranker."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default", template.get("reranker"))
    return template if isinstance(template, str) else None


def _default_in(instructed: Parts, plain: Parts) -> str | None:
    """Return the text that a prompt without an instruction has in its place; None if it is another prompt."""
    at = instructed.index(Slot.INSTRUCTION)
    before, after = text_of(instructed[:at]), text_of(instructed[at + 1 :])
    text = text_of(plain)
    inside = text[len(before) : len(text) - len(after)]
    fits = len(text) >= len(before) + len(after) and text.startswith(before) and text.endswith(after)
    return inside if fits and "\0" not in inside else None


class _Renderer:
    """Renders a chat template in transformers' sandbox, and cuts the result into static text and slots."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, source: str, values: dict[str, Any]) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.source = source
        self.values = {"add_generation_prompt": False, **values}
        self.error = ""

    def parts(self, *, instructed: bool) -> Parts | None:
        """Return the prompt with or without an instruction; None if the template raises an error.

        Raises:
            ModelLoadError: the texts do not appear in the prompt as they are, once, or change the rest of it.
        """
        forms = []
        for texts in _TEXTS:
            roles = [slot for slot in Slot if instructed or slot is not Slot.INSTRUCTION]
            messages = [{"role": _ROLES[slot], "content": texts[slot]} for slot in roles]
            try:
                rendered = self.tokenizer.apply_chat_template(
                    messages, chat_template=self.source, tokenize=False, **self.values
                )
            except Exception as error:  # a template may raise anything
                self.error = first_line(error)
                return None
            forms.append(self._cut(str(rendered), {slot: texts[slot] for slot in roles}))
        problem = f"the chat template in {self.path} renders a different prompt for other texts: it cannot be served"
        refuse_if(forms[0] != forms[1], problem)
        return forms[0]

    def _cut(self, rendered: str, texts: dict[Slot, str]) -> Parts:
        for slot, text in texts.items():
            count = rendered.count(text)
            if count == 1 or (count == 0 and slot is Slot.INSTRUCTION):
                continue
            how = "changes or omits" if count == 0 else "repeats"
            raise ModelLoadError(
                f"the chat template in {self.path} {how} the {slot.value}: only a prompt of one query and one "
                f"document, as they are, can be served"
            )
        return tuple(_pieces(rendered, texts))


def _pieces(rendered: str, texts: dict[Slot, str]) -> Iterator[str | Slot]:
    """Cut a rendered prompt at its texts."""
    start = 0
    for at, slot in sorted((rendered.index(text), slot.value) for slot, text in texts.items() if text in rendered):
        if at > start:
            yield rendered[start:at]
        yield Slot(slot)
        start = at + len(texts[Slot(slot)])
    if start < len(rendered):
        yield rendered[start:]
