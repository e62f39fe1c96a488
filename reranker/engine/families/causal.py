"""Decoders that are scored at the last token of a prompt: by words of their vocabulary, or by a trained score head.

A checkpoint says itself which: config.json has the architecture, and the sentence-transformers files (layout.py) have
the words and the prompt. A family may have a prompt and words for checkpoints without those files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from reranker.engine.checkpoint.adapter import SEQ_CLS
from reranker.engine.checkpoint.config import Checkpoint, check_numbers, check_rope
from reranker.engine.checkpoint.files import AGAIN, refuse_if
from reranker.engine.checkpoint.layout import Answers, Layout, read_layout
from reranker.engine.checkpoint.tokenizer import check_tokenizer
from reranker.engine.checkpoint.weights import HEAD, SCORE_HEAD, Weights
from reranker.engine.families.base import Backbone, Family, Head, Widths
from reranker.engine.families.decoder import Decoder, widths
from reranker.engine.families.labels import check_labels, label_head
from reranker.engine.families.loader import Loader
from reranker.engine.template import Template, text_of
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "use_sliding_window": (False, None),
    "is_causal": (True, None),
    "use_bidirectional_attention": (False, None),
}
"""Fields that change the computation, with the values that are computed here. Null counts as absent."""


class CausalFamily(Family):
    """A decoder with a head of words or a score head."""

    control_tokens: ClassVar[frozenset[str]]
    """Added tokens of the family's tokenizers."""
    card: ClassVar[Template | None] = None
    """The prompt of a checkpoint that has none of its own; None: it must have one."""
    words: ClassVar[tuple[str, str]] = ("yes", "no")
    """The words of a checkpoint that names none: for a relevant document, and for another one."""
    divisors: ClassVar[Mapping[tuple[str, str], float]] = {}
    """By prompt and word, what the authors of a model divide its logit by, where its files do not say so."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        path, config, tokenizer = checkpoint.path, checkpoint.config, checkpoint.tokenizer
        classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        self.auto_class = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        layout = read_layout(checkpoint.folders, tokenizer, self.control_tokens)
        self.template, self.max_length = self._template(layout), layout.max_length
        check_tokenizer(Path(tokenizer.name_or_path), tokenizer, config.vocab_size, self.template.own_tokens)
        self.answers = None if classifier else self._answers(layout)
        if classifier:
            adapter = checkpoint.adapter
            replaced = adapter is not None and adapter.task == SEQ_CLS and layout.folder == path
            words = layout.answers is not None and not replaced
            refuse_if(words, f"{path} has a score head and names words to score (LogitScore): remove the wrong one")
            self._check_score_head()

    def _check_score_head(self) -> None:
        path, config, tokenizer, _, _ = self.checkpoint
        check_labels(path / "config.json", config)
        if config.pad_token_id is None:
            return
        padding = str(tokenizer.convert_ids_to_tokens(config.pad_token_id))
        forms = (self.template.instructed, self.template.plain)
        ends = any(form is not None and str(form[-1]).endswith(padding) for form in forms)
        problem = f"{path} has a score head and a prompt that ends in {padding}, its padding"
        refuse_if(ends, f"{problem}: transformers reads the score before that, so remove it from the chat template")

    @staticmethod
    def check_settings(file: Path, settings: dict[str, Any]) -> None:
        """See `Family.check_settings`."""
        for field, values in _COMPUTED.items():
            value = settings.get(field)
            refuse_if(value not in values, f"{file} has {field}={value!r}: it is computed with {values[0]!r} here")
        check_rope(file, settings)
        check_numbers(file, settings, "rms_norm_eps", "rope_theta")

    @property
    def widths(self) -> Widths:
        """See `Family.widths`."""
        return widths(self.checkpoint.config)

    def _divisor(self) -> float:
        forms = [form for form in (self.template.plain, self.template.instructed) if form is not None]
        if self.answers is None or self.answers.false is not None:
            return 1.0
        return self.divisors.get((text_of(forms[0]), self._word(self.answers.true)), 1.0)

    def head(self, weights: Weights) -> Head:
        """See `Family.head`: the softmax over two logits is the sigmoid of their difference."""
        if self.answers is None:
            return label_head(self.checkpoint.path, weights.tensor(SCORE_HEAD))
        tokens = [token for token in self.answers if token is not None]
        rows = weights.tensor(HEAD)[tokens].float()
        name = " - ".join(f"logit({self._word(token)})" for token in tokens)
        weight = rows[0] - rows[1] if len(rows) == 2 else rows[0]
        problem = f"{name} in {self.checkpoint.path} is the same for every document"
        refuse_if(not weight.any(), f"{problem}: the head was not saved with the model")
        if (divisor := self._divisor()) != 1:
            weight, name = weight / divisor, f"{name} / {divisor:g}"
        return Head(weight, name=name)

    def backbone(self, loader: Loader) -> Backbone:
        """See `Family.backbone`; of an output matrix of its own (8B: 1.2 GB) only the rows of the head are read."""
        return Decoder(loader, self.checkpoint.config)

    def _template(self, layout: Layout) -> Template:
        template = layout.template or self.card
        if template is None:
            problem = f"{self.checkpoint.path} does not say what its prompt is"
            needed = "a chat template with the roles query and document (chat_template.jinja)"
            raise ModelLoadError(f"{problem}: it needs {needed}, as sentence-transformers saves it; {AGAIN}")
        if layout.instruction is None:
            return template
        if template.instructed is None:
            unread = "the default prompt of %s is not read: its chat template has no place for one"
            logger.warning(unread, self.checkpoint.path)
            return template
        return replace(template, instruction=layout.instruction)

    def _answers(self, layout: Layout) -> Answers:
        if layout.answers is None:  # as CrossEncoder does without modules.json
            return Answers(*(self._word_id(word) for word in self.words))
        path, rows = self.checkpoint.path, self.checkpoint.config.vocab_size
        largest = max(token for token in layout.answers if token is not None)
        problem = f"{path} scores the token {largest}, but config.json has a vocab_size of {rows}"
        refuse_if(largest >= rows, f"{problem}: {AGAIN}")
        if layout.template is None:
            known = tuple(map(self._word, layout.answers)) == self.words
            refuse_if(not known, f"{path} names words to score (LogitScore), but has no chat template: {AGAIN}")
        return layout.answers

    def _word_id(self, word: str) -> int:
        tokenizer = self.checkpoint.tokenizer
        token = tokenizer.convert_tokens_to_ids(word)  # as on the card: the entry need not be one that begins a text
        if not isinstance(token, int) or token == tokenizer.unk_token_id:
            raise ModelLoadError(f"the tokenizer has no token {word!r}: not a checkpoint that answers with it")
        return token

    def _word(self, token: int | None) -> str:
        return "" if token is None else str(self.checkpoint.tokenizer.decode([token]))
