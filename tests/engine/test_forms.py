"""Checkpoints with their own head, words or prompt: each is scored as transformers scores its rendered prompt."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.card import INSTRUCTION, PREFIX, SUFFIX
from reranker import Scorer
from reranker.types import RerankRequest, Slice
from tests.engine.checkpoints import (
    CARD_TEMPLATE,
    CTXL_TEMPLATE,
    GENERIC_TEMPLATE,
    UNTIED,
    WIDTH,
    ZERANK_TEMPLATE,
    Edit,
    both,
    qwen2,
    score_head,
    sentence_transformers,
    small_model,
    template,
    tokenizer_config,
    word,
    write,
)
from tests.engine.rendered import Rendered

CARD = f"{PREFIX}<Instruct>: {{instruction}}\n<Query>: {{query}}\n<Document>: {{document}}{SUFFIX}"
MXBAI_TEMPLATE = (
    "{%- set i = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first -%}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{%- if i %}instruction: {{ i }}\n{% endif -%}"
    "query: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "document: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}\n"
    "You are a search relevance expert.\nRelevance:<|im_end|>\n<|im_start|>assistant\n"
)
DOCUMENT_FIRST = (
    "{%- set i = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first -%}"
    "Check whether a given document contains information helpful to answer the query.\n<Document> "
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}\n<Query> "
    "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
    "{%- if i %} {{ i }}{% endif %} ??"
)
ZERANK_GENERATION = (
    "{%- set query = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first -%}"
    "{%- set document = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first -%}"
    "{{ '<|im_start|>system\n' + query + '<|im_end|>\n' }}{{ '<|im_start|>user\n' + document + '<|im_end|>\n' }}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
_QUERY = "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
_DOCUMENT = "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
MARKUP = f"<|im_start|>user\n<query>{_QUERY}</query>\n<document>{_DOCUMENT}</document><|im_end|>\n"
STRUCTURED = (
    "{# of the roles 'query' and 'document' #}<|im_start|>user\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}<|im_end|>\n"
)


@dataclass(frozen=True)
class Form:
    """A form, and how its reference renders a prompt."""

    name: str
    edit: Edit
    prompt: str | None = None
    """`str.format` text; None: the folder's chat template."""
    instruction: str | None = None
    """The default instruction of the folder."""
    reads_instruction: bool = True
    divisor: float = 1.0
    score: str = ""
    """Words of the log about it."""
    base: dict[str, Any] = field(default_factory=dict)
    structured: bool = False
    """Whether the contents of messages are lists."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the chat template."""


_ONE, _TWO = (torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5)) / 10).split(1)
FORMS = [
    Form("a score head", score_head(_ONE), CARD, INSTRUCTION, score="score head", base=UNTIED),
    Form(
        "a score head of two labels",
        score_head(torch.cat([_ONE, _TWO])),
        CARD,
        INSTRUCTION,
        score="second label - first",
    ),
    Form(
        "a score head and a prompt",
        both(
            score_head(_ONE),
            sentence_transformers(template=MXBAI_TEMPLATE),
            lambda path: shutil.rmtree(path / "1_LogitScore"),
            lambda path: (path / "modules.json").unlink(),
        ),
    ),
    Form("other words", sentence_transformers(true=17, false=18), instruction=INSTRUCTION, score="logit("),
    Form("one word", sentence_transformers(true=17, false=None), instruction=INSTRUCTION),
    Form("untied words", sentence_transformers(true=17, false=18), instruction=INSTRUCTION, base=UNTIED),
    Form(
        "zerank's prompt", sentence_transformers(true=17, false=None, template=ZERANK_TEMPLATE), reads_instruction=False
    ),
    Form("the instruction as a user's message", sentence_transformers(template=GENERIC_TEMPLATE)),
    Form(
        "options of the template",
        sentence_transformers(template=GENERIC_TEMPLATE, add_generation_prompt=True),
        options={"add_generation_prompt": True},
    ),
    Form("document first", sentence_transformers(true=0, false=None, template=DOCUMENT_FIRST)),
    Form("document first, without instruction", sentence_transformers(template=CTXL_TEMPLATE), reads_instruction=False),
    Form("an optional instruction", sentence_transformers(true=16, false=15, template=MXBAI_TEMPLATE)),
    Form(
        "a default prompt of an optional instruction",
        sentence_transformers(template=MXBAI_TEMPLATE, prompt="Find it"),
        instruction="Find it",
    ),
    Form("Qwen2", both(qwen2, sentence_transformers(true=16, false=15, template=MXBAI_TEMPLATE)), score="logit("),
    Form("a prompt without words", tokenizer_config(chat_template=ZERANK_TEMPLATE), reads_instruction=False),
    Form("markup around the texts", sentence_transformers(template=MARKUP), reads_instruction=False),
    Form(
        "nothing before the query",
        sentence_transformers(template=f"{_QUERY} is answered by: {_DOCUMENT} ?"),
        reads_instruction=False,
    ),
    Form("contents that are lists", sentence_transformers(template=STRUCTURED, format="structured"), structured=True),
    Form(
        "contents that are lists, by the template",
        tokenizer_config(chat_template=STRUCTURED),
        structured=True,
    ),
    Form(
        "a template by its name",
        both(
            sentence_transformers(template=GENERIC_TEMPLATE, chat_template="reranker"),
            write("additional_chat_templates/reranker.jinja", MARKUP),
        ),
        reads_instruction=False,
        options={"chat_template": "reranker"},
    ),
    Form(
        "the card without the empty thought",
        template(CARD_TEMPLATE.replace(r"\n\n</think>", "")),
        instruction=INSTRUCTION,
    ),
]
TEXTS = [
    "gzip compresses files",
    "x",
    "",
    " ",
    "\n",
    ".",
    "如何压缩文件 gzip 可以压缩文件 " * 6,
    "ends in a line.\n",
    "\n\n begins so",
    "a  b\t c",
    "don't",
    "1 2 3",
    "e\u0301",
    "a longer text about files and folders " * 9,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("forms")
    bases = {repr(form.base): form.base for form in FORMS}
    return {key: small_model(root / str(i), **base) for i, (key, base) in enumerate(bases.items())}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_it_is_scored_as_its_prompt_is(form: Form, folders: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders[repr(form.base)], tmp_path / "model"))
    form.edit(path)
    scorer = Scorer.load(path, device="cpu", precision="float32")
    reference = Rendered(path, form.prompt, structured=form.structured, **form.options)
    rng = random.Random(form.name)
    slices, expected = [], []
    for _ in range(8):
        query, documents = rng.choice(TEXTS) or "q", rng.choices(TEXTS, k=rng.randint(1, 4))
        instruction = rng.choice([None, None, "Find code", "找到答案"])
        request = scorer.encode(RerankRequest(query, documents, instruction))
        used = form.instruction if instruction is None else instruction
        used = used if form.reads_instruction else None
        for document, ids in zip(documents, request.documents, strict=True):
            assert request.prefix + ids == reference.ids(query, document, used)
            expected.append(reference.logit(query, document, used))
        slices.append(Slice(request, 0, len(documents)))
    together = scorer.score(scorer.pack(slices))
    alone = [
        logit
        for part in slices
        for i in range(part.stop)
        for logit in scorer.score(scorer.pack([Slice(part.request, i, i + 1)]))
    ]
    assert together == pytest.approx([logit / form.divisor for logit in expected], abs=1e-5)
    assert alone == pytest.approx(together, abs=1e-5)
    assert max(expected) - min(expected) > 0.1
    assert form.score in scorer.info.score
    assert scorer.info.reads_instruction is form.reads_instruction


def test_zeranks_logit_is_divided_as_its_authors_do(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its files do not say so: the prompt and the word are recognised."""
    path = Path(shutil.copytree(folders["{}"], tmp_path / "model"))
    word("Yes")(path)
    [yes] = AutoTokenizer.from_pretrained(str(path)).encode("Yes", add_special_tokens=False)
    options: dict[str, Any] = {"add_generation_prompt": True}
    sentence_transformers(true=yes, false=None, template=ZERANK_GENERATION, **options)(path)
    scorer, reference = Scorer.load(path, device="cpu", precision="float32"), Rendered(path, **options)
    request = scorer.encode(RerankRequest("how to compress files", TEXTS[:3]))
    expected = [reference.logit("how to compress files", text) / 5 for text in TEXTS[:3]]
    assert scorer.score(scorer.pack([Slice(request, 0, 3)])) == pytest.approx(expected, abs=1e-5)
    assert scorer.info.score == "logit(Yes) / 5"
