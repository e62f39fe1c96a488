"""Small random encoder rerankers as transformers saves them: true architectures, and fast tokenizers of their kinds."""

from __future__ import annotations

import string
import struct
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

STD = {"bert": 0.2, "xlm-roberta": 0.17, "modernbert": 0.12}
"""Deviation of the weights: the logits of two texts then differ by about 1, and float32 computes them to 5e-6."""
POSITIONS = 256
"""Tokens of the longest pair, unless a test sets another length."""
LOCAL = 8
"""Tokens in the window of a local layer of ModernBERT: half of them are on each side."""
WORDS = (
    "the a of to and how files file compress compressed gzip chess game library cat is what code find text short long "
    "ends begins naive http b c d e x y z query document number in it about with"
).split()
CHINESE = "如何压缩文件可以中文今天下雨国际象棋是的。，"
_PIECES = ("com", "press", "ing", "ed", "er", "es", "zip", "lib", "ary", "un", "re", "th", "in", "on", "at", "ou")
_FOLDED = {"Ａ": "A", "\u3000": " ", "ﬁ": "fi", "①": "1", "\x00": "", "\x1b": "", "\t": " ", "\n": " ", "é": "é"}
"""A part of XLM-R's normalisation (NFKC, and no control characters): lengths change in both directions."""
SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "xlm-roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "modernbert": ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<|endoftext|>", "<|padding|>"),
}
"""The control tokens of each kind of tokenizer."""
_SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}


def bert(folder: Path, *, length: int = POSITIONS, **changes: Any) -> Path:
    """Save a BERT reranker (ms-marco-MiniLM): WordPiece, two token types, pooler and classifier."""
    tokenizer = BertTokenizer(vocab=_wordpieces(), model_max_length=length)
    shape = _SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": length, "num_labels": 1}
    return _save(folder, BertForSequenceClassification(BertConfig(**shape | changes)), tokenizer)


def xlm_roberta(folder: Path, *, length: int = POSITIONS, **changes: Any) -> Path:
    """Save an XLM-RoBERTa reranker (bge-reranker): Unigram, positions that start after the padding's, its head."""
    charsmap: Any = _charsmap(_FOLDED)
    tokenizer = XLMRobertaTokenizer(
        vocab=list(_unigrams()), _spm_precompiled_charsmap=charsmap, model_max_length=length
    )
    shape = _SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": length + 2, "num_labels": 1}
    shape |= {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5}
    return _save(folder, XLMRobertaForSequenceClassification(XLMRobertaConfig(**shape | changes)), tokenizer)


def modernbert(folder: Path, pooling: str = "cls", *, length: int = POSITIONS, **changes: Any) -> Path:
    """Save a ModernBERT reranker (gte-reranker-modernbert, granite): byte-level BPE, local layers, cls or mean."""
    tokenizer = _modernbert_tokenizer(length)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"[{name.upper()}]") for name in ("cls", "sep", "pad")}
    ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    shape = _SHAPE | {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": length, "num_labels": 1}
    shape |= {"num_hidden_layers": 5, "local_attention": LOCAL, "classifier_pooling": pooling} | ids
    return _save(folder, ModernBertForSequenceClassification(ModernBertConfig(**shape | changes)), tokenizer)


def modernbert_mean(folder: Path, **changes: Any) -> Path:
    """Save a ModernBERT reranker that averages its last hidden states."""
    return modernbert(folder, "mean", **changes)


KINDS: dict[str, Callable[..., Path]] = {
    "xlm-roberta": xlm_roberta,
    "bert": bert,
    "modernbert-cls": modernbert,
    "modernbert-mean": modernbert_mean,
}


def _save(folder: Path, model: Any, tokenizer: Any) -> Path:
    generator, std = torch.Generator().manual_seed(11), STD[model.config.model_type]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norms and biases differ from 1 and 0, so that an ignored one changes the logits.
            is_norm = "norm" in name.lower() and name.endswith("weight")
            weight.normal_(1.0 if is_norm else 0.0, std, generator=generator)
            if name.endswith("bias"):
                weight /= 4  # else they hide the texts
            elif not is_norm and ("embeddings" in name or "classifier" in name):
                weight *= 4
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def _letters(mark: str) -> list[str]:
    characters = string.ascii_lowercase + string.digits + CHINESE
    return [mark + character for character in dict.fromkeys(characters)]


@cache
def _wordpieces() -> dict[str, int]:
    pieces = [*SPECIAL["bert"], *string.punctuation, *_letters(""), *_letters("##"), *WORDS]
    pieces += [mark + piece for mark in ("", "##") for piece in _PIECES]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


@cache
def _unigrams() -> tuple[tuple[str, float], ...]:
    """Pieces with log probabilities; the control tokens are pieces of the model itself, with 0, as XLM-R's are."""
    *first, mask = SPECIAL["xlm-roberta"]
    characters = [*_letters(""), *string.ascii_uppercase, *string.punctuation, "▁"]
    scores = {"▁" + word: -4.0 - i / 50 for i, word in enumerate(WORDS)}
    scores |= {piece: -6.0 - i / 50 for i, piece in enumerate((*_PIECES, "压缩", "文件", "▁如何", "▁<", "▁的"))}
    scores |= {character: -9.0 - i / 50 for i, character in enumerate(characters)}
    pieces = [*((token, 0.0) for token in first), *scores.items(), (mask, 0.0)]
    return tuple(pieces)


def _modernbert_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """OLMo's tokenizer with BERT's control tokens: runs of spaces are added tokens that are no control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, "<|padding|>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in ["Ġ" + word for word in WORDS] + [*WORDS, *_PIECES]:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair[0] + pair[1] not in vocabulary:
                merges.append(pair)
                vocabulary[pair[0] + pair[1]] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|padding|>", "<|endoftext|>"])
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    tokenizer.add_tokens([AddedToken("|||EMAIL_ADDRESS|||", normalized=True)])
    special = [AddedToken(token, special=True, lstrip=token == "[MASK]") for token in SPECIAL["modernbert"][:5]]
    tokenizer.add_special_tokens(special)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ends
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, model_input_names=inputs, model_max_length=length
    )


def _charsmap(replacements: dict[str, str]) -> bytes:
    """Return SentencePiece's form of replacements: a double-array trie of UTF-8 (darts-clone), then the texts.

    Each node has a block of 256 units, so that no two children meet; the first unit of a block is its leaf.
    """
    texts, blocks = b"", {b"": 0}
    for source in replacements:
        for end in range(1, len(source.encode()) + 1):
            blocks.setdefault(source.encode()[:end], len(blocks))
    units = [0] * (256 * (len(blocks) + 1))
    units[0] = 256 << 10
    leaves = {}
    for source, text in replacements.items():
        leaves[source.encode()] = len(texts)
        texts += text.encode() + b"\0"
    for node, block in blocks.items():
        base = 256 * (block + 1)
        if node in leaves:
            units[base] = leaves[node] | 1 << 31
        if node:
            place = 256 * (blocks[node[:-1]] + 1) + node[-1]
            units[place] = (place ^ base) << 10 | (node in leaves) << 8 | node[-1]
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + texts


def texts_with(tokens: Iterable[str]) -> list[str]:
    """Texts in which control tokens stand at the start, at the end, alone, joined to words and repeated."""
    [*all_tokens] = tokens
    return [
        *all_tokens,
        *(f"gzip {token} files" for token in all_tokens),
        *(f"gzip{token}files" for token in all_tokens),
        f"files {' '.join(all_tokens)}",
        f"{''.join(all_tokens)} the",
        f"压缩{all_tokens[1]}文件 {all_tokens[2]}",
    ]
