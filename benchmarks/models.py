"""Random-weight models of the true shapes beside the true tokenizer, made without a hub and kept in benchmarks/.cache.

Weights say nothing of relevance, but speed, memory and the equality of scores do not depend on their values. A
standard deviation of 0.05 spreads the logits, so that a wrong computation shows. The 151,643 byte-pair ranks of Qwen's
tokenizer come from the package `dashscope`, which carries them as a resource; merges are recovered by running BPE on
every entry; Qwen3's 26 added tokens follow.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from benchmarks.encoder_models import ENCODERS, encoder
from reranker.engine.checkpoint.tensors import Stored
from reranker.engine.checkpoint.weights import Weights

CACHE = Path(__file__).parent / ".cache"
DASHSCOPE = "dashscope==2.0.2"
SHAPES = {  # hidden, intermediate, layers, heads, kv heads, head dim, tied
    "mid": (512, 1536, 8, 8, 4, 64, True),
    "0.6b": (1024, 3072, 28, 16, 8, 128, True),
    "4b": (2560, 9728, 36, 32, 8, 128, True),
    "8b": (4096, 12288, 36, 32, 8, 128, False),
}
MODELS = (*SHAPES, *ENCODERS)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()


class RandomWeights(Weights):
    """Weights that no file holds, made on a device when they are read: the same numbers for a name every time."""

    def __init__(self, config: Qwen3Config, device: torch.device, dtype: torch.dtype, *, std: float = 0.05) -> None:
        with torch.device("meta"):
            made = Qwen3ForCausalLM(config)
        self.path, self.adapter, self.layout = Path("random weights"), None, None
        self._shapes = {name: tensor.shape for name, tensor in made.named_parameters()}
        stored = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        self.stored = {name: Stored(tuple(shape), stored) for name, shape in self._shapes.items()}
        self.files = dict.fromkeys(self.stored, self.path)
        self._device, self._dtype, self._std = device, dtype, std

    def tensor(self, name: str) -> Tensor:
        """See `Weights.tensor`."""
        values = torch.empty(self._shapes[name], device=self._device, dtype=self._dtype)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return values.fill_(1.0) if "norm" in name else values.normal_(0, self._std, generator=generator)


def model(shape: str, *, std: float = 0.05, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a random-weight model; made on the first call, in seconds for `mid`.

    Args:
        shape: one of MODELS.
        std: standard deviation of the weights; of SHAPES only, as `dtype` is.
        dtype: how the weights are stored.
    """
    folder = CACHE / (shape if shape in ENCODERS else f"{shape}-{std}-{str(dtype).removeprefix('torch.')}")
    if (folder / "done").is_file():
        return folder
    if shape in ENCODERS:
        encoder(shape, folder)
        (folder / "done").touch()
        return folder
    hidden, intermediate, layers, heads, kv_heads, head_dim, tied = SHAPES[shape]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tokenizer(), folder)
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 151_669,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "dtype": dtype,
    }
    made: Any = Qwen3ForCausalLM(Qwen3Config(**settings))
    made.to(dtype=dtype)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(0, std)
    made.tie_weights()
    made.save_pretrained(str(folder))
    (folder / "done").touch()
    return folder


def classifier(path: Path) -> Path:
    """The folder of the same decoder with one output, logit(yes) - logit(no): the form that OpenVINO exports."""
    folder = path / "classifier"
    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tokenizer(), folder)
    causal: Any = Qwen3ForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    causal.config.num_labels, causal.config.pad_token_id = 1, 151_643
    made: Any = Qwen3ForSequenceClassification(causal.config)
    made.model = causal.model
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json"))
    yes, no = (causal.lm_head.weight[vocabulary.token_to_id(word)] for word in ("yes", "no"))
    made.score.weight.data = (yes - no).detach()[None]
    made.save_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where transformers 4 reads it
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "done").touch()
    return folder


def tokenizer() -> Path:
    """The folder of the true Qwen3 tokenizer."""
    folder = CACHE / "tokenizer"
    if (folder / "tokenizer_config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    ranks = _ranks()
    letters = _alphabet()
    merges = [_split(token, rank, ranks) for token, rank in sorted(ranks.items(), key=lambda x: x[1]) if len(token) > 1]
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    made = Tokenizer(
        models.BPE(
            vocab={spell[token]: rank for token, rank in ranks.items()},
            merges=[(spell[left], spell[right]) for left, right in merges],
        )
    )
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    for text in SPECIAL + PLAIN:
        token = AddedToken(text, normalized=False, special=text in SPECIAL)
        made.add_special_tokens([token]) if text in SPECIAL else made.add_tokens([token])
    if (made.token_to_id("<|endoftext|>"), made.token_to_id("</think>")) != (151_643, 151_668):
        raise RuntimeError("the ranks are not those of Qwen3: the added tokens got other ids")
    made.save(str(folder / "tokenizer.json"))
    added = {
        str(made.token_to_id(text)): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": text in SPECIAL,
        }
        for text in SPECIAL + PLAIN
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": SPECIAL[1:],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131_072,
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return folder


def _ranks() -> dict[bytes, int]:
    """Qwen's byte-pair ranks, read from the package without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, DASHSCOPE], check=True
        )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith("qwen.tiktoken"))
            lines = wheel.read(name).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line.strip())}


def _alphabet() -> dict[int, str]:
    """The letter that byte-level BPE writes for every byte (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in kept]
    return {b: chr(c) for b, c in zip(kept + rest, kept + [256 + i for i in range(len(rest))], strict=True)}


def _split(token: bytes, below: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge makes `token`: BPE with every rank lower than its own."""
    parts = [bytes([b]) for b in token]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        best = min(pairs, default=None)
        if best is None or best[0] >= below:
            left, right = parts
            return left, right
        i = best[1]
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
