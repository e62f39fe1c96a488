"""Folders as sentence-transformers, transformers and peft write them, with random weights.

The original's files are written byte for byte; everything else is saved by the library that publishes such folders.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore, Transformer
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from benchmarks.card import INSTRUCTION
from tests.conftest import DEMO
from tests.references.original import (
    ORIGINAL_FILES,
    ORIGINAL_TEMPLATE,
    QWEN_VOCABULARY,
    original_config,
    original_tokenizer,
    slots,
)

STD = 0.09
"""Deviation of the weights: a wrong prompt then changes a logit by about 1."""
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000,
}
CODE_TEMPLATE = ORIGINAL_TEMPLATE.replace("Judge whether the Document meets", "Say whether the code solves").replace(
    "<Document>:", "<Code>:\n"
)
"""Of a fine-tune with words of its own."""
ZERANK_TEMPLATE = (
    f"{slots('')}<|im_start|>system\n{{{{ query_text }}}}<|im_end|>\n"
    "<|im_start|>user\n{{ document_text }}<|im_end|>\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The prompt of zeroentropy/zerank-2: it has no instruction."""
CTXL_TEMPLATE = (
    f"{slots('')}Check whether a given document contains information helpful to answer "
    "the query.\n<Document> {{ document_text }}\n"
    "<Query> {{ query_text }}{% if instruction %} {{ instruction }}{% endif %} ??"
)
"""The prompt on the card of ContextualAI's ctxl-rerank-v2."""
MXBAI_TEMPLATE = (
    f"{slots('')}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{% if instruction %}instruction: {{ instruction }}\n{% endif %}"
    "query: {{ query_text }}\ndocument: {{ document_text }}\nYou are a search relevance expert who evaluates how well "
    "documents match search queries. For each query-document pair, carefully analyze the semantic relationship between "
    "them, then provide your binary relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n"
    "<|im_start|>assistant\n\n"
)
"""The prompt of mxbai-rerank-v2's own package."""
GENERIC_TEMPLATE = (
    "{%- for message in messages %}{%- if message.role in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""A chat model's, with no place for query and document: sentence-transformers refuses pairs with it."""


def original(folder: Path) -> Path:
    """Write the original's repository with a smaller model: only config.json and the weights differ."""
    shape = SHAPE | {"head_dim": 32, "max_window_layers": 2}
    weights = randomize(Qwen3ForCausalLM(Qwen3Config(**shape, vocab_size=151_669, tie_word_embeddings=True)))
    weights.save_pretrained(str(folder))
    files = ORIGINAL_FILES | original_tokenizer() | {"config.json": original_config(**shape, torch_dtype="float32")}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    settings = json.loads((QWEN_VOCABULARY / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = GENERIC_TEMPLATE  # chat_template.jinja is read in its place
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def randomize(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """Fill a model with random weights; a norm's lie around 1, so that an ignored one changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(float("norm" in name), STD, generator=generator)
    return model


def tokenizer(template: str | None = None) -> Any:
    """Return the demo's tokenizer, whose 8192 entries hold merges across the borders of a prompt's parts."""
    loaded = AutoTokenizer.from_pretrained(str(DEMO))
    loaded.chat_template = template
    return loaded


def causal(folder: Path, kind: str = "qwen3", **changes: Any) -> Path:
    """Save a Qwen3 or Qwen2 language model and its tokenizer as transformers does."""
    words = tokenizer()
    changes = {"vocab_size": len(words), "tie_word_embeddings": True} | changes
    if kind == "qwen3":
        model: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32, **changes))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, **changes))
    randomize(model).save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


def logit_score(
    folder: Path,
    base: Path,
    true: str | int,
    false: str | int | None,
    *,
    template: str = ORIGINAL_TEMPLATE,
    prompt: str | None = None,
    generation_prompt: bool = False,
) -> Path:
    """Save a language model as a CrossEncoder that scores the tokens `true` and `false`."""
    words = tokenizer()
    ids = [words.convert_tokens_to_ids(word) if isinstance(word, str) else word for word in (true, false)]
    options = {"chat_template": {"add_generation_prompt": True}} if generation_prompt else None
    transformer = Transformer(
        str(base),
        transformer_task="text-generation",
        processor_kwargs={"chat_template": template},
        processing_kwargs=options,
    )
    return save(folder, [transformer, LogitScore(*ids)], prompt)


def save(folder: Path, modules: list[torch.nn.Module], prompt: str | None = None) -> Path:
    """Save modules as a CrossEncoder whose default prompt is `prompt`."""
    model = CrossEncoder(
        modules=modules,
        device="cpu",
        prompts={} if prompt is None else {"query": prompt},
        default_prompt_name=None if prompt is None else "query",
        activation_fn=torch.nn.Identity(),
    )
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def classifier(folder: Path, *, labels: int = 1, template: str | None = None, **settings: Any) -> Path:
    """Save a model with a classification head and its tokenizer, as conversions do."""
    words = tokenizer(template)
    shape = SHAPE | {"head_dim": 32, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    config = Qwen3Config(**shape | {"num_labels": labels} | settings)
    randomize(Qwen3ForSequenceClassification(config)).save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


def classifier_layout(folder: Path, base: Path) -> Path:
    """Save a classifier as a CrossEncoder of one module."""
    return save(folder, [Transformer(str(base), transformer_task="sequence-classification")], INSTRUCTION)


def adapter(folder: Path, base: Path, model: PreTrainedModel, task: TaskType, **settings: Any) -> Path:
    """Save a LoRA adapter of `model`, which was loaded from `base`, with the tokenizer beside it as trainers do."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task} | settings)
    adapted = get_peft_model(model, config)
    _randomize_adapter(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(folder))
    return folder


def cross_encoder_adapter(folder: Path, base: Path, task: TaskType) -> Path:
    """Add a LoRA adapter to a CrossEncoder and save it: all its files but config.json and the base's weights."""
    model = CrossEncoder(str(base), device="cpu")
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type=task))
    _randomize_adapter(model)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def _randomize_adapter(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(float("norm" in name), STD, generator=generator)


@dataclass(frozen=True)
class Form:
    """A kind of folder that CrossEncoder scores from the texts alone."""

    name: str
    build: Callable[[Path], Path]
    instructions: bool = True
    """Whether the prompt has a place for an instruction; both sides ignore one otherwise."""


_ST_5 = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.2.0"}
"""What sentence-transformers before 5.4 wrote into config.json, in place of files of its own."""


def _base(folder: Path, **settings: Any) -> Path:
    return causal(folder.with_name(folder.name + "-base"), **settings)


def _layout_base(folder: Path) -> Path:
    return logit_score(folder.with_name("layout"), _base(folder), "1", "0", template=CODE_TEMPLATE, prompt="Find code")


def _classifier_base(folder: Path) -> Path:
    return classifier(folder.with_name(folder.name + "-base"), template=ORIGINAL_TEMPLATE)


FORMS = [
    Form("original layout", lambda f: logit_score(f, _base(f), "yes", "no", prompt=INSTRUCTION)),
    Form("untied", lambda f: logit_score(f, _base(f, tie_word_embeddings=False), "yes", "no", prompt=INSTRUCTION)),
    Form("other words", lambda f: logit_score(f, _base(f), "1", "0", prompt=INSTRUCTION)),
    Form("one word", lambda f: logit_score(f, _base(f), "yes", None, prompt=INSTRUCTION)),
    Form("other instruction", lambda f: logit_score(f, _base(f), "yes", "no", prompt="Given a bug, find its mend")),
    Form("other template", lambda f: logit_score(f, _base(f), "yes", "no", template=CODE_TEMPLATE)),
    Form(
        "zerank",
        lambda f: logit_score(f, _base(f), "yes", None, template=ZERANK_TEMPLATE, generation_prompt=True),
        instructions=False,
    ),
    Form(
        "a generation prompt that is not asked for",
        lambda f: logit_score(f, _base(f), "yes", None, template=ZERANK_TEMPLATE),
        instructions=False,
    ),
    Form("ctxl", lambda f: logit_score(f, _base(f), 0, None, template=CTXL_TEMPLATE)),
    Form("mxbai", lambda f: logit_score(f, _base(f, kind="qwen2"), "1", "0", template=MXBAI_TEMPLATE)),
    Form("classifier", lambda f: classifier(f, template=ORIGINAL_TEMPLATE, sentence_transformers=_ST_5)),
    Form("classifier, a layout of one module", lambda f: classifier_layout(f, _classifier_base(f))),
    Form("adapter", lambda f: cross_encoder_adapter(f, _layout_base(f), TaskType.CAUSAL_LM)),
    Form("adapter of a classifier", lambda f: cross_encoder_adapter(f, _classifier_base(f), TaskType.SEQ_CLS)),
]
