"""Random-weight cross-encoders of true architecture with tokenizers of their kinds, made without a hub.

`minilm` is cross-encoder/ms-marco-MiniLM-L6-v2 (BERT, WordPiece), `bge-base` BAAI/bge-reranker-base (XLM-RoBERTa,
Unigram). The vocabularies hold the words and the characters of short.json and long.json, so a word is one token: about
a fifth fewer tokens than with the true vocabularies, for every contestant alike.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from benchmarks.workloads import read

ENCODERS = {  # hidden, intermediate, layers, heads
    "minilm": (384, 1536, 6, 12),
    "bge-base": (768, 3072, 12, 12),
}
VOCABULARY = 30_522
"""Of both; BGE's own has 250,002, but no embedding that is not looked up costs time."""
MAX_LENGTH = 512


def encoder(shape: str, folder: Path) -> None:
    """Write a model with its tokenizer into a folder.

    Args:
        shape: a key of ENCODERS.
        folder: is replaced.
    """
    hidden, intermediate, layers, heads = ENCODERS[shape]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_labels": 1,
    }
    torch.manual_seed(0)
    made: Any
    if shape == "minilm":
        made = BertForSequenceClassification(BertConfig(**settings, max_position_embeddings=MAX_LENGTH))
        tokenizer, special = _word_piece(), {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"}
        kind = {"tokenizer_class": "BertTokenizer", "mask_token": "[MASK]"}
    else:
        # Positions begin after the padding's, 1.
        positions: dict[str, Any] = {
            "max_position_embeddings": MAX_LENGTH + 2,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        }
        ids: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
        made = XLMRobertaForSequenceClassification(XLMRobertaConfig(**settings, **positions, **ids))
        tokenizer, special = _unigram(), {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
        kind = {"tokenizer_class": "XLMRobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "LayerNorm" in name:
                weight.fill_(float(name.endswith("weight")))
            else:
                weight.normal_(0, 2 / math.sqrt(hidden))  # so that the scores of documents differ
    made.save_pretrained(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**kind, **{f"{name}_token": token for name, token in special.items()}, "model_max_length": MAX_LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _counts(split: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer) -> Counter[str]:
    """Words of the workloads' texts, most frequent first, equal ones by alphabet."""
    texts = [text for name in ("short", "long") for row in read(name) for text in (row["query"], *row["documents"])]
    counts = Counter(w for text in texts for w, _ in split.pre_tokenize_str(normalizer.normalize_str(text)))
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


def _word_piece() -> Tokenizer:
    normalizer, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = _counts(split, normalizer)
    letters = sorted({letter for word in counts for letter in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    pieces = list(dict.fromkeys([*pieces, *counts]))[:VOCABULARY]
    made = Tokenizer(models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, split, decoders.WordPiece()
    made.add_special_tokens(pieces[:5])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def _unigram() -> Tokenizer:
    normalizer, split = normalizers.NFKC(), pre_tokenizers.Metaspace()
    counts = _counts(split, normalizer)
    total = sum(counts.values())
    pieces = {"<s>": 0.0, "<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    pieces |= dict.fromkeys(sorted({letter for word in counts for letter in word}), -20.0)
    pieces |= {word: math.log(count / total) for word, count in counts.items()}
    made = Tokenizer(models.Unigram(list(pieces.items())[: VOCABULARY - 1], unk_id=3, byte_fallback=False))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, split, decoders.Metaspace()
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return made
