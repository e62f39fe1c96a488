"""Read a prompt from the chat template of a checkpoint: rendered once with marks for the texts, and cut at them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from reranker.engine.checkpoint.files import first_line, refuse_if
from reranker.engine.template import Parts, Slot, Template, fill, text_of
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

_ROLES = {Slot.INSTRUCTION: "system", Slot.QUERY: "query", Slot.DOCUMENT: "document"}
_MARKS = {slot: f"\t An <{role}> &amp;  'more'\r\n\nOF {{{{ it }}}}\\n 1,000\t" for slot, role in _ROLES.items()}
"""Texts that a template changes which trims, joins lines, escapes, or turns to lower or upper case."""
_TEXTS: tuple[dict[Slot, str], ...] = (
    {Slot.INSTRUCTION: "2nd order", Slot.QUERY: "is it?", Slot.DOCUMENT: "第二个文档 " * 9 + "."},
    {Slot.INSTRUCTION: "x", Slot.QUERY: "# x", Slot.DOCUMENT: "# x"},
    {slot: f"{role} " * 10_000 for slot, role in _ROLES.items()},
)
"""The prompt must be the same around these."""
_BLANK = (_MARKS | {Slot.DOCUMENT: ""}, _MARKS | {Slot.DOCUMENT: " "}, _MARKS | {Slot.INSTRUCTION: " "})
"""Nobody asks for these: where the prompt is another one, it is said, and the template is served."""
_NOT_RENDERED = {"padding", "truncation", "max_length", "return_tensors", "restore_suffix", "tokenize", "return_dict"}
"""Options that sentence-transformers does not hand to the template."""
_NO_DATE = "{%- macro strftime_now(form) %}{{ raise_exception('it writes the date into the prompt') }}{% endmacro %}\n"
"""Before a template, which would have the date of the load in every prompt; jinja drops the line break."""
_STRUCTURED = ("content[0]", ".type", "'type'", '"type"', "message.content[")
"""By these sentence-transformers recognises a template whose contents are lists, where no file says so."""


def read_template(
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

    Args:
        path: the folder of the tokenizer.
        tokenizer: with the chat template.
        control_tokens: the added tokens of the model family.
        options: sentence_bert_config.json.
        required: whether the template must have the roles.

    Raises:
        ModelLoadError: it cannot be rendered, or renders something else than static text around the texts.
    """
    given = section(options, "processing_kwargs", "chat_template")
    source = _source(tokenizer, given.get("chat_template"))
    if source is None:
        return None
    if not required and not all(re.search(f"['\"]{role}['\"]", source) for role in ("query", "document")):
        return None
    form = section(options, "modality_config", "message").get("format", "auto")
    structured = form == "structured" or (form == "auto" and any(text in source for text in _STRUCTURED))
    values = {name: value for name, value in given.items() if name not in _NOT_RENDERED | {"chat_template"}}
    rendered = _Renderer(path, tokenizer, source, values, structured=structured)
    with_instruction = rendered.parts(instructed=True)
    plain = rendered.parts(instructed=False)
    if with_instruction is None and plain is None:
        raise ModelLoadError(f"the chat template in {path} cannot be rendered: {rendered.error}")
    if rendered.blank:
        logger.warning("the chat template in %s has another prompt for blank texts, which is not used", path)
    instruction: str | None = None
    if with_instruction is not None and Slot.INSTRUCTION not in with_instruction:
        with_instruction, plain = None, plain or with_instruction
    if with_instruction is not None and plain is not None:
        instruction = _default_in(with_instruction, plain)
        plain = plain if instruction is None else None
    text = "\0".join(text_of(parts) for parts in (with_instruction, plain) if parts is not None)
    added = tokenizer.added_tokens_decoder.values()
    own = {str(token) for token in added if str(token) in text and (token.special or _is_marker(str(token)))}
    return Template(with_instruction, plain, instruction, control_tokens | own, "the chat template of the checkpoint")


def section(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return an object inside sentence_bert_config.json; empty where it is absent."""
    for name in names:
        options = options.get(name) or {}
        refuse_if(not isinstance(options, dict), f"sentence_bert_config.json has {name}, which is not a JSON object")
    return options


def _source(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str | None:
    """Return the text of the chat template; of several, the one of this name, else default or reranker."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get(name or "default", name or template.get("reranker"))
    else:
        template = name or template  # transformers: a name that it does not know is a template itself
    return template if isinstance(template, str) else None


def _is_marker(token: str) -> bool:
    """Whether an added token is one for prompts, such as <doc>, and no word that texts have too."""
    return re.search(r"[<>\[\]{}|]", token) is not None


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

    def __init__(
        self, path: Path, tokenizer: PreTrainedTokenizerBase, source: str, values: dict[str, Any], *, structured: bool
    ) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.source = _NO_DATE + source
        self.values = {"add_generation_prompt": False, **values}
        self.structured = structured
        self.error = ""
        self.blank = False
        """Whether the prompt is another one for blank texts."""

    def parts(self, *, instructed: bool) -> Parts | None:
        """Return the prompt with or without an instruction; None if the template raises an error.

        Raises:
            ModelLoadError: the texts do not appear in the prompt as they are, once, or change the rest of it.
        """
        slots = [slot for slot in Slot if instructed or slot is not Slot.INSTRUCTION]
        try:
            parts = self._cut(self._render(_MARKS, slots), slots)
            problem = (
                f"the chat template in {self.path} renders a different prompt for other texts: it cannot be served"
            )
            refuse_if(any(self._render(texts, slots) != fill(parts, texts) for texts in _TEXTS), problem)
            self.blank |= any(self._render(texts, slots) != fill(parts, texts) for texts in _BLANK)
        except ModelLoadError:
            raise
        except Exception as error:  # a template may raise anything
            self.error = first_line(error)
            return None
        return parts

    def _render(self, texts: Mapping[Slot, str], slots: list[Slot]) -> str:
        messages: list[dict[str, Any]] = []
        for slot in slots:
            content = [{"type": "text", "text": texts[slot]}] if self.structured else texts[slot]
            messages.append({"role": _ROLES[slot], "content": content})
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=self.source, tokenize=False, **self.values
        )
        return str(rendered)

    def _cut(self, rendered: str, slots: list[Slot]) -> Parts:
        for slot in slots:
            count = rendered.count(_MARKS[slot])
            if count == 1 or (count == 0 and slot is Slot.INSTRUCTION):
                continue
            how = "changes or omits" if count == 0 else "repeats"
            raise ModelLoadError(
                f"the chat template in {self.path} {how} the {slot.value}: only a prompt of one query and one "
                f"document, as they are, can be served"
            )
        return tuple(_pieces(rendered, slots))


def _pieces(rendered: str, slots: list[Slot]) -> Iterator[str | Slot]:
    """Cut a rendered prompt at its marks."""
    start = 0
    for at, name in sorted((rendered.index(_MARKS[slot]), slot.value) for slot in slots if _MARKS[slot] in rendered):
        if at > start:
            yield rendered[start:at]
        yield Slot(name)
        start = at + len(_MARKS[Slot(name)])
    if start < len(rendered):
        yield rendered[start:]
