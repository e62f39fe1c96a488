"""The original repository's files, rebuilt: sizes and the beginnings of their SHA-256 as the hub lists them."""

from __future__ import annotations

import hashlib

import pytest

from tests.references.original import ORIGINAL_FILES, QWEN_VOCABULARY, original_config, original_tokenizer

LISTED = {
    "config.json": (727, "d479c427"),
    "chat_template.jinja": (741, "6f682162"),
    "1_LogitScore/config.json": (57, "73e31564"),
    "config_sentence_transformers.json": (325, "6a153d66"),
    "modules.json": (280, "6f13b6b4"),
    "sentence_bert_config.json": (362, "3234ebd2"),
}
LISTED_TOKENIZER = {
    "tokenizer.json": (11_422_654, "aeb13307"),
    "merges.txt": (1_671_853, "8831e4f1"),
    "vocab.json": (2_776_833, "ca10d7e9"),
}


def listed(files: dict[str, str]) -> dict[str, tuple[int, str]]:
    stored = {name: content.encode() for name, content in files.items()}
    return {name: (len(content), hashlib.sha256(content).hexdigest()[:8]) for name, content in stored.items()}


def test_the_files_that_say_how_it_is_scored_are_the_original_s() -> None:
    assert listed(ORIGINAL_FILES | {"config.json": original_config()}) == LISTED


@pytest.mark.skipif(not QWEN_VOCABULARY.is_dir(), reason="Qwen3's tokenizer is missing: run `make tokenizer`")
def test_the_tokenizer_is_the_original_s() -> None:
    assert listed(original_tokenizer()) == LISTED_TOKENIZER
