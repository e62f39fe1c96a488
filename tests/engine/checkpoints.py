"""Variants of a checkpoint as people publish, convert and lose parts of them: each an edit of a tiny sound folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.card import PREFIX, SUFFIX

Edit = Callable[[Path], None]

CARD_TEMPLATE = (
    "{%- set ns = namespace(i='Given a web search query, retrieve relevant passages that answer the query') -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{%- set ns.i = m.content -%}"
    "{%- elif m.role == 'query' -%}{%- set ns.q = m.content -%}"
    "{%- elif m.role == 'document' -%}{%- set ns.d = m.content -%}{%- endif -%}"
    "{%- endfor -%}"
    f"{{{{ {PREFIX!r} }}}}<Instruct>: {{{{ ns.i }}}}\n"
    f"<Query>: {{{{ ns.q }}}}\n<Document>: {{{{ ns.d }}}}{{{{ {SUFFIX!r} }}}}"
)
"""The prompt of the model card as a chat template of the roles system, query and document."""
ZERANK_TEMPLATE = (
    "{%- for m in messages -%}{%- if m['role'] == 'query' -%}<|im_start|>system\n{{ m['content'] }}<|im_end|>\n"
    "{%- elif m['role'] == 'document' -%}<|im_start|>user\n{{ m['content'] }}<|im_end|>\n{%- endif -%}{%- endfor -%}"
    "<|im_start|>assistant\n"
)
CTXL_TEMPLATE = (
    "{%- for m in messages -%}{%- if m.role == 'document' -%}<Document> {{ m.content }}\n{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- if m.role == 'query' -%}<Query> {{ m.content }} ??{%- endif -%}{%- endfor -%}"
)
STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
GENERIC_TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Variant:
    """A variant and what becomes of it."""

    name: str
    edit: Edit
    refused: str = ""
    """Words of the error; without any, the scores are those of the card on the same folder."""
    base: dict[str, Any] = field(default_factory=dict)
    """Keywords of `make_model` for the folder that is edited."""
    instruction: str | None = None
    """The default instruction that the folder brings, if it is not the card's."""
    warned: str = ""
    """Words of a WARNING in the log."""


def config(path: Path, **values: Any) -> None:
    """Change fields of config.json; None removes one."""
    file = path / "config.json"
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


def null(field: str) -> Edit:
    """A field of config.json that is there and null."""

    def edit(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: None}))

    return edit


def settings(**values: Any) -> Edit:
    """Only fields of config.json."""
    return lambda path: config(path, **values)


def tensors(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change what model.safetensors holds."""
    file = path / "model.safetensors"
    made = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
    save_file(made, file, {"format": "pt"})


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Edit:
    """Only tensors."""
    return lambda path: tensors(path, change)


def write(name: str, content: object) -> Edit:
    """One more file: text as it is, bytes as they are, everything else as JSON."""

    def edit(path: Path) -> None:
        file = path / name
        file.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    return edit


def both(*edits: Edit) -> Edit:
    """One after another."""

    def edit(path: Path) -> None:
        for each in edits:
            each(path)

    return edit


def renamed(prefix: str = "", *, without: str = "") -> Edit:
    """Every tensor under another name."""
    return weights(lambda found: {prefix + name.removeprefix(without): tensor for name, tensor in found.items()})


def without(*parts: str) -> Edit:
    """Without the tensors whose names hold one of these."""
    return weights(lambda found: {n: t for n, t in found.items() if not any(part in n for part in parts)})


def and_tensor(name: str, tensor: Tensor | None = None) -> Edit:
    """With a tensor more."""
    return weights(lambda found: found | {name: torch.ones(4) if tensor is None else tensor})


def as_type(dtype: torch.dtype, *parts: str) -> Edit:
    """Tensors stored in another type: all, or those whose names hold one of these."""
    return weights(
        lambda found: {n: t.to(dtype) if not parts or any(p in n for p in parts) else t for n, t in found.items()}
    )


def tokenizer_json(change: Callable[[dict[str, Any]], None]) -> Edit:
    """Change tokenizer.json."""

    def edit(path: Path) -> None:
        file = path / "tokenizer.json"
        value = json.loads(file.read_text(encoding="utf-8"))
        change(value)
        file.write_text(json.dumps(value), encoding="utf-8")

    return edit


def tokenizer_config(**values: Any) -> Edit:
    """Change tokenizer_config.json."""

    def edit(path: Path) -> None:
        file = path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def slow_tokenizer(path: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json."""
    model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (path / "tokenizer.json").unlink()


def added_tokens_json(path: Path) -> None:
    """The added tokens in a file of their own, as older transformers write them."""
    added = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    slow_tokenizer(path)
    write("added_tokens.json", {token["content"]: token["id"] for token in added})(path)


def merges_as(kind: type) -> Edit:
    """Merges as older tokenizers write them, each a string, or as newer ones do, each a pair."""

    def change(value: dict[str, Any]) -> None:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in value["model"]["merges"]]
        value["model"]["merges"] = [" ".join(pair) for pair in pairs] if kind is str else pairs

    return tokenizer_json(change)


def word(text: str, *, special: bool = False) -> Edit:
    """A token added as fine-tuning scripts do it, with a row of its own in the embedding."""

    def edit(path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        tokenizer.add_special_tokens({"extra_special_tokens": [text]}) if special else tokenizer.add_tokens([text])
        tokenizer.save_pretrained(str(path))
        long_embedding(path)

    return edit


def backend(change: Callable[[dict[str, Any]], None]) -> Edit:
    """Change tokenizer.json for a class that reads all of it; Qwen's own class builds most of it anew."""
    return both(tokenizer_json(change), tokenizer_config(tokenizer_class="TokenizersBackend"))


def folder_in_place_of(name: str) -> Edit:
    """What a bind mount makes of a file that is not there."""

    def edit(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return edit


def transformer_module(path: Path) -> None:
    """An embedding model in the layout that older sentence-transformers write."""
    inner = path / "0_Transformer"
    inner.mkdir()
    for file in [f for f in path.iterdir() if f != inner]:
        shutil.move(file, inner)
    modules = [{"path": "0_Transformer", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    write("modules.json", modules)(path)
    write("1_Pooling/config.json", {})(path)


def cut_merges(path: Path) -> None:
    """merges.txt of a download that ended early."""
    slow_tokenizer(path)
    lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
    (path / "merges.txt").write_text("\n".join(lines[: len(lines) * 9 // 10]), encoding="utf-8")


def mlx(path: Path) -> None:
    """bfloat16 as MLX saves it."""
    file = path / "model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "mlx"})


def appending(path: Path) -> None:
    """A post-processor that appends a token to every text."""
    file = str(path / "tokenizer.json")
    made = Tokenizer.from_file(file)
    end = made.token_to_id("<|endoftext|>")
    made.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)])
    made.save(file)


def padded_tokenizer(path: Path) -> None:
    """Padding and truncation stored in the tokenizer."""
    made = Tokenizer.from_file(str(path / "tokenizer.json"))
    made.enable_padding(length=40)
    made.enable_truncation(20)
    made.save(str(path / "tokenizer.json"))


def without_think(path: Path) -> None:
    """The tokenizer of an older model, which spells <think> out."""

    def change(value: dict[str, Any]) -> None:
        value["added_tokens"] = [t for t in value["added_tokens"] if "think" not in t["content"]]

    tokenizer_json(change)(path)
    tokens = json.loads((path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    kept = {i: t for i, t in tokens.items() if "think" not in t["content"]}
    tokenizer_config(added_tokens_decoder=kept)(path)


def sentence_transformers(
    true: int | None = None, false: int | None = None, template: str = CARD_TEMPLATE, prompt: str | None = None
) -> Edit:
    """The layout that the original repositories have; ids of yes and no unless others are given."""

    def edit(path: Path) -> None:
        made = Tokenizer.from_file(str(path / "tokenizer.json"))
        yes, no = (made.token_to_id(word) for word in ("yes", "no"))
        base = "sentence_transformers.cross_encoder.modules."
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.Transformer"},
            {"idx": 1, "name": "1", "path": "1_LogitScore", "type": base + "LogitScore"},
        ]
        write("modules.json", modules)(path)
        ids = {"true_token_id": yes if true is None else true, "false_token_id": no if false is None else false}
        write("1_LogitScore/config.json", ids)(path)
        write("chat_template.jinja", template)(path)
        forward = {"method": "forward", "method_output_name": "logits"}
        transformer = {
            "transformer_task": "text-generation",
            "modality_config": {"text": forward, "message": forward | {"format": "flat"}},
            "module_output_name": "causal_logits",
        }
        write("sentence_bert_config.json", transformer)(path)
        about = {
            "__version__": {"sentence_transformers": "5.4.0"},
            "activation_fn": "torch.nn.modules.linear.Identity",
            "model_type": "CrossEncoder",
            "default_prompt_name": None if prompt is None else "query",
            "prompts": {} if prompt is None else {"query": prompt},
        }
        write("config_sentence_transformers.json", about)(path)

    return edit


def shards(path: Path) -> None:
    """Two shards and their index in place of one file."""
    found = load_file(path / "model.safetensors")
    names = sorted(found)
    index: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: found[name].clone() for name in part}, path / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "model.safetensors").unlink()


def stale_shards(path: Path) -> None:
    """A shard of another model beside the one file."""
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}, path / "model-00001-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )


def only_head(path: Path) -> None:
    """Tied weights of which the head is stored and the embedding is not."""
    tensors(path, lambda found: {n.replace("model.embed_tokens", "lm_head"): t for n, t in found.items()})


def other_head(path: Path) -> None:
    """Tied by the config, and another head in the file all the same."""
    tensors(path, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].flip(1)})


def same_head(path: Path) -> None:
    """Tied weights stored twice."""
    tensors(path, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"]})


def zero_head(path: Path) -> None:
    """An untied head that was never filled."""
    tensors(path, lambda found: found | {"lm_head.weight": torch.zeros_like(found["lm_head.weight"])})


def short_embedding(path: Path) -> None:
    """An embedding without rows for the last added tokens, and a config that says so."""
    size = json.loads((path / "config.json").read_text())["vocab_size"] - 3
    tensors(path, lambda found: found | {n: t[:size] for n, t in found.items() if "embed_tokens" in n})
    config(path, vocab_size=size)


def long_embedding(path: Path) -> None:
    """More rows than the tokenizer has tokens, as the true checkpoints have."""
    size = json.loads((path / "config.json").read_text())["vocab_size"] + 50
    tensors(
        path,
        lambda found: {
            n: torch.cat([t, torch.ones(50, t.shape[1])]) if "embed_tokens" in n else t for n, t in found.items()
        },
    )
    config(path, vocab_size=size)


def old_config(path: Path) -> None:
    """config.json as transformers 4.51 writes it."""
    config(path, rope_parameters=None, layer_types=None, dtype=None, rope_theta=1_000_000, torch_dtype="float32")
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": None}))


def marked(name: str) -> Edit:
    """A byte order mark before a file."""

    def edit(path: Path) -> None:
        (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())

    return edit


def dead_link(name: str) -> Edit:
    """A link into a cache that is not there."""

    def edit(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to("../../blobs/d479c427")

    return edit


def removed(*names: str) -> Edit:
    """Without files."""

    def edit(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return edit


def nested(path: Path) -> None:
    """Everything in a folder within the folder."""
    inner = path / "checkpoint-100"
    inner.mkdir()
    for file in [f for f in path.iterdir() if f != inner]:
        shutil.move(file, inner)


def yarn(**spelling: Any) -> Edit:
    """YaRN in one of its spellings."""
    rope = {"factor": 4.0, "original_max_position_embeddings": 10240, **spelling}
    return both(settings(rope_parameters=None), settings(rope_scaling=rope, rope_theta=1_000_000))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:d479c427\nsize 727\n"
UNTIED = {"tied": False}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 1e6,
}
_ADAPTER = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Qwen3-Reranker-4B"}
_EMBEDDING = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def nothing(path: Path) -> None:
    """As it is."""


RIGHT = [
    Variant("float32", nothing),
    Variant("bfloat16", as_type(torch.bfloat16)),
    Variant("float16", as_type(torch.float16)),
    Variant("tied, the head stored too", same_head),
    Variant("tied, only the head stored", only_head),
    Variant("tied, another head stored", other_head, warned="NOT tie them"),
    Variant("untied", nothing, base=UNTIED),
    Variant("config of transformers 4.51", old_config),
    Variant("a window that is not used", settings(sliding_window=4096, use_sliding_window=False, max_window_layers=1)),
    Variant("no architectures", settings(architectures=None)),
    Variant("attention biases", nothing, base={"attention_bias": True}),
    Variant("yarn, rope_type", yarn(rope_type="yarn")),
    Variant("yarn, type", yarn(type="yarn")),
    Variant("yarn, rope_parameters", settings(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6})),
    Variant("linear", settings(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6})),
    Variant("llama3", settings(rope_parameters=_LLAMA3)),
    Variant("shards", shards),
    Variant("stale shards beside the file", stale_shards),
    Variant("more rows than tokens", long_embedding),
    Variant("tokenizer.json alone", removed("tokenizer_config.json")),
    Variant("vocab.json and merges.txt", slow_tokenizer),
    Variant("vocab.json, merges.txt and added_tokens.json", added_tokens_json),
    Variant("merges as strings", merges_as(str)),
    Variant("merges as pairs", merges_as(list)),
    Variant("a word added by a fine-tune", word("gzip")),
    Variant("a word of the prompt added by a fine-tune", word("<Query>")),
    Variant("a special token added by a fine-tune", word("<|sep|>", special=True), warned="special tokens of the"),
    Variant("bfloat16 of MLX", mlx),
    Variant("class Qwen2TokenizerFast", tokenizer_config(tokenizer_class="Qwen2TokenizerFast")),
    Variant("class PreTrainedTokenizerFast", tokenizer_config(tokenizer_class="PreTrainedTokenizerFast")),
    Variant("class TokenizersBackend", tokenizer_config(tokenizer_class="TokenizersBackend")),
    Variant("extra_special_tokens, a list", tokenizer_config(extra_special_tokens=["<|im_start|>"])),
    Variant("extra_special_tokens, a dictionary", tokenizer_config(extra_special_tokens={"start": "<|im_start|>"})),
    Variant("stored padding and truncation", padded_tokenizer),
    Variant("a token appended to every text", appending),
    Variant("a generic chat template", write("chat_template.jinja", GENERIC_TEMPLATE)),
    Variant("a generic chat template in the tokenizer", tokenizer_config(chat_template=GENERIC_TEMPLATE)),
    Variant("the sentence-transformers layout", sentence_transformers()),
    Variant("the layout without a template", both(sentence_transformers(), removed("chat_template.jinja"))),
    Variant("an instruction of its own", sentence_transformers(prompt="Find code"), instruction="Find code"),
    Variant(
        "an instruction in its template",
        sentence_transformers(template=CARD_TEMPLATE.replace("Given a web search query", "Given a bug")),
        instruction="Given a bug, retrieve relevant passages that answer the query",
    ),
    Variant(
        "an activation of its own",
        both(
            sentence_transformers(),
            write("config_sentence_transformers.json", {"activation_fn": "zeroentropy.ScaledSigmoid"}),
        ),
        warned="the activation ScaledSigmoid",
    ),
    Variant("silu under its other name", settings(hidden_act="swish")),
    Variant("a pointer that nothing reads", write("eval_results.json", POINTER)),
    Variant("a dead link that nothing reads", lambda path: (path / "tool.jinja").symlink_to("nowhere")),
    Variant("a prefix before the first word", tokenizer_config(add_prefix_space=True)),
    Variant("leftovers of a training", both(write("optimizer.pt", b"x"), write("checkpoint-9/config.json", "{}"))),
    Variant("a value head beside the model", and_tensor("v_head.summary.weight"), warned="v_head.summary.weight"),
    Variant(
        "a frequency stored by old transformers",
        and_tensor("model.layers.0.self_attn.rotary_emb.inv_freq"),
        warned="inv_freq",
    ),
    Variant("an adapter in a folder of its own", write("adapter/adapter_config.json", _ADAPTER), warned="LoRA adapter"),
    Variant(
        "fewer positions than MAX_SEQ_LENGTH", settings(max_position_embeddings=4096), warned="max_position_embeddings"
    ),
]

WRONG = [
    # Weights that are not there: each loaded with random numbers in their place.
    Variant("untied, no head", without("lm_head"), "lm_head.weight: save the head", base=UNTIED),
    Variant("tied, and the config does not say so", settings(tie_word_embeddings=False), '"tie_word_embeddings": true'),
    Variant("names of PEFT", renamed("base_model.model."), "begin with 'base_model.model.'"),
    Variant("names of torch.compile", renamed("_orig_mod."), "begin with '_orig_mod.'"),
    Variant("names of DataParallel", renamed("module."), "begin with 'module.'"),
    Variant("names of two wrappers", renamed("_orig_mod.module."), "begin with '_orig_mod.module.'"),
    Variant("names of a bare backbone", renamed(without="model."), "lack 'model.'"),
    Variant(
        "more layers in the config",
        settings(num_hidden_layers=5, layer_types=None),
        "hold 3 layers and config.json has 5",
    ),
    Variant("a layer missing in the middle", without("layers.1."), "not saved or not downloaded"),
    Variant("a norm missing", without("layers.2.self_attn.q_norm"), "model.layers.2.self_attn.q_norm.weight"),
    Variant("an embedding missing", without("embed_tokens"), "model.embed_tokens.weight"),
    Variant("a head of zeros", zero_head, "equal rows for yes and no", base=UNTIED),
    # Weights that would be ignored.
    Variant(
        "more layers in the file", settings(num_hidden_layers=2, layer_types=None), "config.json has 2 layers only"
    ),
    Variant("a score head", and_tensor("score.weight", torch.ones(1, 96)), "another head is not computed"),
    Variant("a classifier", and_tensor("classifier.bias"), "classifier.bias"),
    Variant(
        "biases that the config has not",
        settings(attention_bias=False),
        "attention_bias",
        base={"attention_bias": True},
    ),
    Variant("scales of FP8", and_tensor("model.layers.0.mlp.up_proj.weight_scale"), "quantised weights"),
    Variant(
        "scales of fine-grained FP8", and_tensor("model.layers.0.mlp.up_proj.weight_scale_inv"), "quantised weights"
    ),
    Variant("GPTQ without its config", and_tensor("model.layers.0.mlp.up_proj.qweight"), "quantised weights"),
    Variant("MLX without its config", and_tensor("model.layers.0.mlp.up_proj.biases"), "quantised weights"),
    Variant("int8 without its config", as_type(torch.int8, "up_proj"), "I8"),
    Variant("int4 without its config", as_type(torch.uint8, "up_proj"), "U8"),
    Variant("float8 without its config", as_type(torch.float8_e4m3fn, "down_proj"), "F8_E4M3"),
    Variant("an adapter in the weights", and_tensor("model.layers.0.self_attn.q_proj.lora_A.weight"), "not merged"),
    Variant(
        "names of an adapter that was not merged",
        weights(lambda f: {n.replace("q_proj.", "q_proj.base_layer."): t for n, t in f.items()}),
        "not merged",
    ),
    # Shapes.
    Variant("another width", settings(intermediate_size=96), "model.layers.0.mlp.gate_proj.weight is [160, 96]"),
    Variant("no head_dim", settings(head_dim=None), "head_dim"),
    Variant("another vocabulary", settings(vocab_size=9000), "vocab_size"),
    Variant("an embedding without rows for the control tokens", short_embedding, "vocab_size"),
    Variant("a head under another name", and_tensor("rank_head.weight", torch.ones(1, 96)), "another head is not"),
    Variant("a prompt that was tuned", and_tensor("prompt_encoder.embedding.weight"), "not merged"),
    Variant(
        "fused weights", weights(lambda f: {f"layers.{i}": t for i, t in enumerate(f.values())}), "another program"
    ),
    # Other models and other computations.
    Variant("a normalizer that strips", backend(lambda v: v.update(normalizer=STRIP)), "other tokens than"),
    Variant("dropout of merges", backend(lambda v: v["model"].update(dropout=0.01)), "dropout"),
    Variant("control tokens split", tokenizer_config(split_special_tokens=True), "split"),
    Variant("merges cut off", cut_merges, "it was cut off"),
    Variant("an architecture that is no list", settings(architectures=5), "architecture 5"),
    Variant("a norm without sense", settings(rms_norm_eps=0), "rms_norm_eps=0"),
    Variant("a theta that is text", settings(rope_parameters={"rope_theta": "1e6"}), "rope_theta=1e6"),
    Variant(
        "a factor that is text",
        settings(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": "4"}),
        "factor=4",
    ),
    Variant("NaN in the config", write("config.json", '{"rms_norm_eps": NaN}'), "holds NaN"),
    Variant("sizes that make no model", settings(num_attention_heads=0), "config.json"),
    Variant("a padding token beyond the rows", settings(pad_token_id=10**6), "config.json"),
    Variant("quantised, and nobody knows how", settings(quantization_config={}), "(unknown method)"),
    Variant("an embedding model in folders", transformer_module, "holds no config.json"),
    Variant(
        "an embedding model's own file",
        write("config_sentence_transformers.json", {"similarity_fn_name": "cosine"}),
        "embedding model (config_sentence",
    ),
    Variant("a pooling beside it", write("1_Pooling/config.json", {}), "embedding model (Pooling"),
    Variant(
        "answers without modules.json", write("1_LogitScore/config.json", {"true_token_id": 3}), "tokens 3 and None"
    ),
    Variant(
        "answers that were not downloaded",
        both(sentence_transformers(), removed("1_LogitScore/config.json")),
        "cannot read",
    ),
    Variant(
        "a generic template that is the prompt", sentence_transformers(template=GENERIC_TEMPLATE), "another prompt"
    ),
    Variant(
        "a template that trims",
        sentence_transformers(template=CARD_TEMPLATE.replace("ns.q }}", "ns.q | trim }}")),
        "another prompt",
    ),
    Variant("lower case", write("sentence_bert_config.json", {"do_lower_case": True}), "do_lower_case"),
    Variant(
        "a default prompt that is a list",
        write("config_sentence_transformers.json", {"default_prompt_name": []}),
        "no prompt for",
    ),
    Variant("a folder in place of the weights", folder_in_place_of("model.safetensors"), "is a folder and not a file"),
    Variant("an adapter beside the base", write("adapter_config.json", _ADAPTER), "LoRA adapter"),
    Variant("an adapter's weights beside the base", write("adapter_model.safetensors", b"x"), "LoRA adapter"),
    Variant(
        "an adapter with the config of its base",
        both(write("adapter_config.json", _ADAPTER), removed("model.safetensors")),
        "merge it into its base model",
    ),
    Variant(
        "an adapter alone",
        both(write("adapter_config.json", _ADAPTER), removed("config.json", "model.safetensors")),
        "merge it into its base model",
    ),
    *(
        Variant(
            f"quantised: {method}", settings(quantization_config={"quant_method": method, "bits": 4}), f"({method})"
        )
        for method in (
            "gptq",
            "awq",
            "compressed-tensors",
            "fp8",
            "bitsandbytes",
            "torchao",
            "modelopt",
            "hqq",
            "quark",
        )
    ),
    Variant("bitsandbytes of old", settings(quantization_config={"load_in_8bit": True}), "(bitsandbytes)"),
    Variant("quantised by who knows what", settings(quantization_config={"bits": 4}), "(unknown method)"),
    Variant("compressed-tensors of old", settings(compression_config={"quant_method": "sparseml"}), "(sparseml)"),
    Variant("MLX", settings(quantization={"bits": 8, "group_size": 64}), "(MLX)"),
    Variant("AutoGPTQ's own file", write("quantize_config.json", {"bits": 4}), "(GPTQ)"),
    Variant("ModelOpt's own file", write("hf_quant_config.json", {}), "(NVIDIA ModelOpt)"),
    Variant(
        "rope dynamic",
        settings(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}),
        "'dynamic'",
    ),
    Variant("rope longrope", yarn(rope_type="longrope"), "'longrope'"),
    Variant("rope dynamic, old spelling", yarn(type="dynamic"), "'dynamic'"),
    Variant(
        "rope by kind of layer",
        settings(rope_parameters={"full_attention": {"rope_type": "ntk"}}),
        "another rope_parameters",
    ),
    Variant(
        "rope on a part of the head",
        settings(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        "partial_",
    ),
    Variant("yarn without a factor", settings(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "config.json"),
    Variant("no rope_theta", settings(rope_parameters=None), "no rope_theta"),
    Variant("another activation", settings(hidden_act="gelu"), "hidden_act='gelu'"),
    Variant("no causal mask", settings(is_causal=False), "is_causal=False"),
    Variant("both directions", settings(use_bidirectional_attention=True), "use_bidirectional_attention"),
    Variant("a sliding window", settings(use_sliding_window=True), "use_sliding_window"),
    Variant(
        "sliding layers", settings(layer_types=["full_attention", "sliding_attention", "full_attention"]), "sliding"
    ),
    Variant("a field of another type", settings(hidden_size="96"), "hidden_size"),
    Variant("auto_map that is null", null("auto_map"), "remove auto_map"),
    Variant("code of its own", settings(auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map"),
    Variant("weights under another name", settings(transformers_weights="other.safetensors"), "transformers_weights"),
    Variant("an embedding model", write("modules.json", _EMBEDDING), "embedding model (Pooling"),
    Variant("an embedding model's architecture", settings(architectures=["Qwen3Model"]), "without lm_head"),
    Variant(
        "converted", settings(architectures=["Qwen3ForSequenceClassification"]), "original Qwen3ForCausalLM weights"
    ),
    Variant("listwise", settings(architectures=["JinaForRanking"]), "JinaForRanking"),
    Variant("another model", settings(model_type="qwen2"), "model_type is 'qwen2'"),
    Variant("no model_type", settings(model_type=None), "model_type is None"),
    Variant("other words", sentence_transformers(true=17, false=18), "the tokens 17 and 18"),
    Variant("one word (zerank)", sentence_transformers(true=17, template=ZERANK_TEMPLATE), "the tokens 17"),
    Variant(
        "another prompt, the document first (ctxl)", sentence_transformers(template=CTXL_TEMPLATE), "another prompt"
    ),
    Variant("another prompt", sentence_transformers(template=ZERANK_TEMPLATE), "renders another prompt"),
    Variant(
        "another prompt in the tokenizer", tokenizer_config(chat_template=ZERANK_TEMPLATE), "renders another prompt"
    ),
    Variant(
        "a prompt without the empty thought",
        write("chat_template.jinja", CARD_TEMPLATE.replace(r"\n\n</think>", "")),
        "another",
    ),
    Variant(
        "a template that fails", write("chat_template.jinja", "{{ 1 / 0 }} 'query' 'document'"), "cannot be rendered"
    ),
    Variant(
        "a template that reaches out",
        write("chat_template.jinja", "{{ ''.__class__.__mro__ }} 'query' 'document'"),
        "template",
    ),
    Variant(
        "a default prompt that is not there",
        both(
            sentence_transformers(),
            write("config_sentence_transformers.json", {"default_prompt_name": "q", "prompts": {}}),
        ),
        "no prompt for its default_prompt_name",
    ),
    Variant(
        "a module that is not computed", write("modules.json", [{"path": "2_Dense", "type": "x.Dense"}]), "'Dense'"
    ),
    Variant("modules that are none", write("modules.json", "{}"), "not a JSON array"),
    Variant("a tokenizer without <think>", without_think, "splits <think> into"),
    # Half downloads and mounts.
    Variant("pointer: weights", write("model.safetensors", POINTER), "git lfs pull"),
    Variant("pointer: tokenizer", write("tokenizer.json", POINTER), "git lfs pull"),
    Variant("pointer: config", write("config.json", POINTER), "git lfs pull"),
    Variant("dead link: config", dead_link("config.json"), "which does not exist here"),
    Variant("dead link: weights", dead_link("model.safetensors"), "which does not exist here"),
    Variant("dead link: tokenizer", dead_link("tokenizer.json"), "which does not exist here"),
    Variant("no config", removed("config.json"), "holds no config.json: download it first"),
    Variant("no weights", removed("model.safetensors"), "holds no *.safetensors: download it first"),
    Variant("no tokenizer", removed("tokenizer.json"), "holds no tokenizer"),
    Variant("a vocabulary without merges", both(slow_tokenizer, removed("merges.txt")), "no merges.txt"),
    Variant("in a folder within", nested, "checkpoint-100 does"),
    Variant(
        "shards without index",
        both(shards, removed("model.safetensors.index.json")),
        "the index of the shards is missing",
    ),
    Variant("a shard missing", both(shards, removed("model-00002-of-00002.safetensors")), "1 of 2 shards are missing"),
    Variant(
        "an index of pickles",
        both(shards, write("model.safetensors.index.json", {"weight_map": {"x": "x.bin"}})),
        "nothing else is read",
    ),
    Variant("an index that is none", both(shards, write("model.safetensors.index.json", "[]")), "not a JSON object"),
    Variant("mark: config", marked("config.json"), "byte order mark"),
    Variant("mark: tokenizer", marked("tokenizer.json"), "byte order mark"),
    Variant("config in UTF-16", write("config.json", "{}".encode("utf-16")), "byte order mark"),
    Variant("config cut off", write("config.json", "{"), "not JSON"),
    Variant("config of an array", write("config.json", "[]"), "not a JSON object"),
    Variant("config empty", write("config.json", ""), "not JSON"),
    Variant("tokenizer cut off", write("tokenizer.json", '{"model": '), "not JSON"),
    Variant("tokenizer of something else", write("tokenizer.json", "{}"), "no usable tokenizer"),
    Variant("weights cut off", write("model.safetensors", b"\x10\0\0\0\0\0\0\0{"), "broken or half downloaded"),
    Variant("weights empty", write("model.safetensors", b""), "broken or half downloaded"),
    *(
        Variant(f"format: {name}", both(removed("model.safetensors"), write(name, b"x")), words)
        for name, words in {
            "pytorch_model.bin": "pickles are not read",
            "model.pt": "pickles are not read",
            "model-Q8_0.gguf": "GGUF is not read",
            "model.onnx": "ONNX is not read",
            "onnx/model.onnx": "ONNX is not read",
            "openvino_model.xml": "OpenVINO is not read",
            "tf_model.h5": "TensorFlow",
            "flax_model.msgpack": "Flax",
        }.items()
    ),
]
