"""Load a checkpoint's tokenizer, and refuse one that gives other tokens than the model was trained with."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reranker.engine.checkpoint.files import AGAIN, first_line, read_json, read_text, refuse_if
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

_PROBES = ("Gzip Files", "files ", "a  b\n", "é１", "中文 压缩", "naïve-Text's")
"""Texts that a lower-casing, an accent, a width or a blank treated in another way would change."""


def load_tokenizer(path: Path, base: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a folder, which is the tokenizer's `name_or_path` afterwards.

    Args:
        path: the folder.
        base: if that is an adapter's, the folder of its base: what the adapter lacks of tokenizer and chat template is
            read there.

    Raises:
        ModelLoadError: its files are missing or broken.
    """
    if base is None:
        return _load(path)
    if not (path / "tokenizer.json").is_file() and not (path / "vocab.json").is_file():
        tokenizer = _load(base)
        if (path / "chat_template.jinja").is_file():
            tokenizer.chat_template = read_text(path / "chat_template.jinja")
        return tokenizer
    tokenizer = _load(path)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _load(base).chat_template
    return tokenizer


def _load(path: Path) -> PreTrainedTokenizerBase:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json"):
        if (path / name).is_file():
            length = read_json(path / name).get("model_max_length")
            wrong = name == "tokenizer_config.json" and type(length) not in (int, float, type(None))
            refuse_if(wrong, f"{path / name} has model_max_length={str(length)[:40]!r}: it must be a number")
    if (path / "chat_template.jinja").is_file():
        read_text(path / "chat_template.jinja")
    if not (path / "tokenizer.json").is_file():
        _check_merges(path / "merges.txt", read_json(path / "vocab.json"))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exceptions
        raise ModelLoadError(f"no usable tokenizer in {path}: {first_line(error)}") from error
    return tokenizer


def check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, rows: int, control_tokens: Sequence[str]) -> None:
    """Refuse a tokenizer that splits a control token, draws ids at random, or has ids without a row of the embedding.

    Raises:
        ModelLoadError: names the cause.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    dropout = backend is not None and getattr(backend.model, "dropout", None)
    refuse_if(dropout, f"the tokenizer in {path} drops merges at random (dropout): set it to null")
    split = getattr(tokenizer, "split_special_tokens", False)
    refuse_if(split, f"{path / 'tokenizer_config.json'} sets split_special_tokens: remove it")
    configured = any((path / name).is_file() for name in ("tokenizer_config.json", "added_tokens.json"))
    cause = "it is not the tokenizer of these weights" if configured else "tokenizer_config.json is missing"
    largest = 0
    for text in control_tokens:
        ids = tokenizer.encode(text, add_special_tokens=False)
        refuse_if(len(ids) != 1, f"the tokenizer in {path} splits {text} into {len(ids)} tokens: {cause}")
        largest = max(largest, ids[0])
    if backend is not None:
        largest = max(largest, *backend.get_vocab(with_added_tokens=False).values(), 0)
    # Words that a fine-tune added are recognised in user text; its special tokens are plain text there.
    largest = max(largest, *(token for token, added in tokenizer.added_tokens_decoder.items() if not added.special), 0)
    problem = f"the tokenizer in {path} has the token id {largest}, but config.json has a vocab_size of {rows}"
    refuse_if(largest >= rows, f"{problem}: they do not belong to one model")


def warn_if_rebuilt(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if the tokenizer gives other tokens than its tokenizer.json alone, as other servers read it.

    transformers 5 builds the tokenizers of BERT and XLM-RoBERTa by their class, without the file's normalizer and
    pre-tokenizer.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return
    alone = Tokenizer.from_file(str(file))
    alone.no_truncation()
    alone.no_padding()
    for text in _PROBES:
        if alone.encode(text, add_special_tokens=False).ids != tokenizer.encode(text, add_special_tokens=False):
            problem = "texts such as %r get other tokens from %s (transformers %s) than from %s alone: scores are "
            way = "those of transformers; TEI's may differ"
            logger.warning(problem + way, text, type(tokenizer).__name__, version("transformers"), file)
            return


def _check_merges(file: Path, vocabulary: dict[str, int]) -> None:
    """Refuse a truncated merges.txt: it would give other tokens without an error."""
    merged = {line.replace(" ", "") for line in read_text(file).splitlines()}
    absent = [t for t in vocabulary if len(t) > 1 and t not in merged and not re.fullmatch(r"<.*>", t)]
    problem = f"{file} has no merge for {len(absent)} of the {len(vocabulary)} tokens in vocab.json"
    refuse_if(absent, f"{problem}: it is truncated, {AGAIN}")
