"""The files of Qwen/Qwen3-Reranker-0.6B at e61197ed, rebuilt byte for byte."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from benchmarks.card import INSTRUCTION, PREFIX, SUFFIX
from benchmarks.models import CACHE

QWEN_VOCABULARY = CACHE / "tokenizer"


def _first(role: str) -> str:
    return f'messages | selectattr("role", "eq", "{role}") | map(attribute="content") | first'


def slots(default: str) -> str:
    """Return the start of a template: it sets instruction (or `default`), query_text and document_text."""
    return (
        f"{{%- set instruction = {_first('system')} | default({json.dumps(default)}) -%}}\n"
        f"{{%- set query_text = {_first('query')} -%}}\n"
        f"{{%- set document_text = {_first('document')} -%}}\n"
    )


ORIGINAL_TEMPLATE = (
    f"{slots(INSTRUCTION)}{PREFIX}<Instruct>: {{{{ instruction }}}}\n"
    f"<Query>: {{{{ query_text }}}}\n<Document>: {{{{ document_text }}}}{SUFFIX}\n"
)
"""Of Qwen/Qwen3-Reranker-0.6B; jinja drops the last newline."""
ORIGINAL_FILES = {
    "modules.json": json.dumps(
        [
            {
                "idx": 0,
                "name": "0",
                "path": "",
                "type": "sentence_transformers.base.modules.transformer.Transformer",
            },
            {
                "idx": 1,
                "name": "1",
                "path": "1_LogitScore",
                "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
            },
        ],
        indent=2,
    ),
    "1_LogitScore/config.json": json.dumps({"true_token_id": 9693, "false_token_id": 2152}, indent=4),
    "sentence_bert_config.json": json.dumps(
        {
            "transformer_task": "text-generation",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "logits"},
                "message": {"method": "forward", "method_output_name": "logits", "format": "flat"},
            },
            "module_output_name": "causal_logits",
        },
        indent=4,
    ),
    "config_sentence_transformers.json": json.dumps(
        {
            "__version__": {"pytorch": "2.10.0+cu128", "sentence_transformers": "5.4.0"},
            "activation_fn": "torch.nn.modules.linear.Identity",
            "default_prompt_name": "query",
            "model_type": "CrossEncoder",
            "prompts": {"query": INSTRUCTION},
        },
        indent=2,
    ),
    "chat_template.jinja": ORIGINAL_TEMPLATE,
}
"""The files of Qwen/Qwen3-Reranker-0.6B at e61197ed that sentence-transformers reads, byte for byte."""


def original_config(**changes: Any) -> str:
    """Return the original's config.json, as transformers 4.51 wrote it."""
    settings: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151669,
    }
    return json.dumps(settings | changes, indent=2) + "\n"


@cache
def original_tokenizer() -> dict[str, str]:
    """Return the original's tokenizer.json, vocab.json and merges.txt, from the vocabulary of `make tokenizer`."""
    tokenizer = json.loads((QWEN_VOCABULARY / "tokenizer.json").read_text(encoding="utf-8"))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer |= {"decoder": level, "post_processor": level}
    tokenizer["pre_tokenizer"]["pretokenizers"][1] = level
    model = tokenizer["model"] | {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    merges = (" ".join(merge) for merge in model["merges"])
    return {
        "tokenizer.json": Tokenizer.from_str(json.dumps(tokenizer | {"model": model})).to_str(pretty=True),
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False, separators=(",", ":")),
        "merges.txt": "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges),
    }
