"""The demo model's tokenizer: Qwen3's, with a vocabulary of 8,192 entries instead of 151,669.

Every property that the service needs is as in Qwen3: NFC, the pre-tokenizer pattern, byte-level BPE without an unknown
token, the 26 added tokens with their flags, "yes" and "no" as single tokens.
"""

import json
import random
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's and Qwen3's pattern of the words that BPE merges within."""

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
VOCABULARY = 8192
COMMON = 10
PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web '
    "search query, retrieve relevant passages that answer the query\n<Query>: \n<Document>: <|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""The words of the model card's prompt become single tokens, because every document has it as prefix."""


def train(english: list[str], chinese: list[str], folder: Path, seed: int = 0) -> Tokenizer:
    """Learn the merges, add Qwen3's tokens, and write the tokenizer's two files.

    The training text has twice as much English as Chinese. Chinese characters that occur `COMMON` times are single
    tokens, because BPE alone would spend its entries on the repeated phrases of manuals.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(PLAIN),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    size = 2 * sum(map(len, chinese))
    sample = rng.sample(english, len(english))
    texts: list[str] = []
    while sample and size > 0:
        texts.append(sample.pop())
        size -= len(texts[-1])
    counts = Counter(char for text in chinese for char in text if "\u3400" <= char <= "\u9fff")
    words = [PROMPT, "yes", "no", *(char for char, count in counts.items() if count >= COMMON)]
    tokenizer.train_from_iterator([*texts, *chinese, *["\n".join(words)] * 5000], trainer)
    for tokens, special in ((SPECIAL, True), (PLAIN, False)):
        for token in tokens:
            added = [AddedToken(token, normalized=False, special=special)]
            tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert all(len(tokenizer.encode(word).ids) == 1 for word in ("yes", "no"))
    save(tokenizer, folder)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json in Qwen3's form."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": SPECIAL[1:],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": token in SPECIAL}
            for token in SPECIAL + PLAIN
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
