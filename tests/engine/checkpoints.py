"""Variants of a checkpoint as people publish, convert and damage them: each an edit of a small sound folder."""

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
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from benchmarks.card import PREFIX, SUFFIX
from tests.conftest import make_model

Edit = Callable[[Path], object]
Tensors = dict[str, Tensor]
WIDTH, ENTRIES = 32, 1000
"""Hidden size, and entries of the vocabulary besides the added tokens."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

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
GENERIC_TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Variant:
    """A variant and the expected result."""

    name: str
    edit: Edit
    refused: str = ""
    """Words of the error; without any, the scores are those of the card on the same folder."""
    base: dict[str, Any] = field(default_factory=dict)
    """Keywords of `make_model` for the folder that is edited."""
    instruction: str | None = None
    """The folder's default instruction, if it is not the card's."""
    warned: str = ""
    """Words of a WARNING in the log."""


def small_model(folder: Path, **changes: Any) -> Path:
    """A sound folder that loads quickly: a narrow model, and the first merges of the demo's tokenizer."""
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 24}
    make_model(folder, vocab_size=ENTRIES + 26, num_key_value_heads=1, **(shape | changes))

    def shorten(tokenizer: dict[str, Any]) -> None:
        model, added = tokenizer["model"], tokenizer["added_tokens"]
        model["merges"] = model["merges"][: ENTRIES - len(model["vocab"]) + len(model["merges"])]
        model["vocab"] = {text: i for text, i in model["vocab"].items() if i < ENTRIES}
        tokenizer["added_tokens"] = [token | {"id": ENTRIES + i} for i, token in enumerate(added)]

    def renumber(settings: dict[str, Any]) -> None:
        tokens = settings["added_tokens_decoder"].values()
        settings["added_tokens_decoder"] = {str(ENTRIES + i): token for i, token in enumerate(tokens)}

    edit_json("tokenizer.json", shorten)(folder)
    edit_json("tokenizer_config.json", renumber)(folder)
    return folder


def qwen2(path: Path) -> None:
    """Put a small Qwen2 model into a folder of `small_model`; its weights are as varied as a trained model's."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": ENTRIES + 26}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(3)
    model: Any = Qwen2ForCausalLM(Qwen2Config.from_dict(sizes | heads))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(str(path))


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """Change a JSON file."""

    def edit(path: Path) -> None:
        value = json.loads((path / name).read_text(encoding="utf-8"))
        change(value)
        (path / name).write_text(json.dumps(value), encoding="utf-8")

    return edit


def settings(**values: Any) -> Edit:
    """Change fields of config.json; None removes one."""

    def change(config: dict[str, Any]) -> None:
        config.update(values)
        for name in [name for name, value in values.items() if value is None]:
            del config[name]

    return edit_json("config.json", change)


def config(path: Path, **values: Any) -> None:
    """Change fields of config.json; None removes one."""
    settings(**values)(path)


def rope(**values: Any) -> Edit:
    """Rope parameters with a theta."""
    return settings(rope_parameters={"rope_theta": 1e6, **values})


def old_rope(**values: Any) -> Edit:
    """YaRN's factors in the field that transformers 4 writes."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": 10240, **values}
    return both(settings(rope_parameters=None), settings(rope_scaling=scaling, rope_theta=1_000_000))


def old_config(path: Path) -> None:
    """config.json as transformers 4.51 writes it."""
    config(path, rope_parameters=None, layer_types=None, dtype=None, rope_theta=1_000_000, torch_dtype="float32")
    edit_json("config.json", lambda v: v.update(rope_scaling=None))(path)


def tokenizer_config(**values: Any) -> Edit:
    """Change tokenizer_config.json."""
    return edit_json("tokenizer_config.json", lambda v: v.update(values))


def tensors(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change model.safetensors."""
    file = path / "model.safetensors"
    changed = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
    save_file(changed, file, {"format": "pt"})


def weights(change: Callable[[Tensors], Tensors]) -> Edit:
    """Change model.safetensors."""
    return lambda path: tensors(path, change)


def renamed(change: Callable[[str], str]) -> Edit:
    """Rename every tensor."""
    return weights(lambda f: {change(name): tensor for name, tensor in f.items()})


def without(part: str) -> Edit:
    """Remove the tensors whose names hold `part`."""
    return weights(lambda f: {name: tensor for name, tensor in f.items() if part not in name})


def and_tensor(name: str, *shape: int) -> Edit:
    """Add a tensor."""
    return weights(lambda f: f | {name: torch.ones(shape or 4)})


def as_type(dtype: torch.dtype, part: str = "") -> Edit:
    """Store the tensors whose names hold `part` in another type."""
    return weights(lambda f: {name: tensor.to(dtype) if part in name else tensor for name, tensor in f.items()})


def embedding_rows(more: int) -> Edit:
    """Give the embedding more or fewer rows, and config.json the same number."""

    def edit(path: Path) -> None:
        size = ENTRIES + 26 + more
        rows = torch.ones(max(more, 0), WIDTH)
        tensors(path, lambda f: f | {EMBEDDING: torch.cat([f[EMBEDDING], rows])[:size]})
        config(path, vocab_size=size)

    return edit


def mlx(path: Path) -> None:
    """Store bfloat16 as MLX does."""
    file = path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "mlx"})


def shards(path: Path) -> None:
    """Write two shards and their index in place of one file."""
    stored = load_file(path / "model.safetensors")
    names = sorted(stored)
    index: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: stored[name].clone() for name in part}, path / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    write("model.safetensors.index.json", {"metadata": {}, "weight_map": index})(path)
    (path / "model.safetensors").unlink()


def stale_shards(path: Path) -> None:
    """Add a shard of another model, and its index, beside the one file."""
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}, path / "model-00001-of-00002.safetensors")
    write("model.safetensors.index.json", {"weight_map": {"x": "model-00001-of-00002.safetensors"}})(path)


def write(name: str, content: object) -> Edit:
    """Write a file: bytes and text as they are, everything else as JSON."""

    def edit(path: Path) -> None:
        (path / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return edit


def both(*edits: Edit) -> Edit:
    """Apply edits in order."""
    return lambda path: [edit(path) for edit in edits]


def removed(*names: str) -> Edit:
    """Remove files."""

    def edit(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return edit


def marked(name: str) -> Edit:
    """Put a byte order mark before a file."""
    return lambda path: (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())


def dead_link(name: str) -> Edit:
    """Replace a file by a link into a cache that is absent."""
    return both(removed(name), lambda path: (path / name).symlink_to("../../blobs/d479c427"))


def folder_in_place_of(name: str) -> Edit:
    """Replace a file by a folder, as a bind mount of an absent file does."""
    return both(removed(name), lambda path: (path / name).mkdir())


def into(folder: str) -> Edit:
    """Move all files into a folder inside the folder."""

    def edit(path: Path) -> None:
        files = list(path.iterdir())
        (path / folder).mkdir()
        for file in files:
            shutil.move(file, path / folder)

    return edit


def slow_tokenizer(path: Path) -> None:
    """Write vocab.json and merges.txt in place of tokenizer.json."""
    model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    write("vocab.json", model["vocab"])(path)
    write("merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")(path)
    (path / "tokenizer.json").unlink()


def truncated_merges(path: Path) -> None:
    """Truncate merges.txt, as an interrupted download does."""
    slow_tokenizer(path)
    lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
    write("merges.txt", "\n".join(lines[: len(lines) * 9 // 10]))(path)


def added_tokens_json(path: Path) -> None:
    """Write the added tokens into a file of their own, as older transformers do."""
    added = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    slow_tokenizer(path)
    write("added_tokens.json", {token["content"]: token["id"] for token in added})(path)


def merges_as(kind: type) -> Edit:
    """Write each merge as a string, as older tokenizers do, or as a pair, as newer ones do."""

    def change(value: dict[str, Any]) -> None:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in value["model"]["merges"]]
        value["model"]["merges"] = [" ".join(pair) for pair in pairs] if kind is str else pairs

    return edit_json("tokenizer.json", change)


def word(text: str, *, special: bool = False) -> Edit:
    """Add a token with a row of the embedding, as fine-tuning scripts do."""

    def edit(path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        tokenizer.add_special_tokens({"extra_special_tokens": [text]}) if special else tokenizer.add_tokens([text])
        tokenizer.save_pretrained(str(path))
        embedding_rows(50)(path)

    return edit


def backend(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Change tokenizer.json for a class that reads all of it; Qwen's own class ignores most of it."""
    return both(edit_json("tokenizer.json", change), tokenizer_config(tokenizer_class="TokenizersBackend"))


def tokenizer(change: Callable[[Tokenizer], object]) -> Edit:
    """Change the tokenizer by its own methods."""

    def edit(path: Path) -> None:
        changed = Tokenizer.from_file(str(path / "tokenizer.json"))
        change(changed)
        changed.save(str(path / "tokenizer.json"))

    return edit


def append_token(tokenizer: Tokenizer) -> None:
    """Set a post-processor that appends a token to every text."""
    end = "<|endoftext|>"
    special = [(end, tokenizer.token_to_id(end))]
    tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=special)


def pad(tokenizer: Tokenizer) -> None:
    """Store padding and truncation."""
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(20)


def without_think(path: Path) -> None:
    """Remove <think>, as in the tokenizer of an older model."""

    def change(value: dict[str, Any]) -> None:
        value["added_tokens"] = [t for t in value["added_tokens"] if "think" not in t["content"]]

    def change_config(value: dict[str, Any]) -> None:
        tokens = value["added_tokens_decoder"].items()
        value["added_tokens_decoder"] = {i: t for i, t in tokens if "think" not in t["content"]}

    edit_json("tokenizer.json", change)(path)
    edit_json("tokenizer_config.json", change_config)(path)


def sentence_transformers(
    true: int | None = None,
    false: int | None = -1,
    template: str = CARD_TEMPLATE,
    prompt: str | None = None,
    format: str = "flat",
    **options: Any,
) -> Edit:
    """Write the layout of the original repositories; the token ids are those of yes and no unless given.

    `false`: -1 for no, None for a score of one word; `format`: of the messages; `options`: of the chat template.
    """

    def edit(path: Path) -> None:
        vocabulary = Tokenizer.from_file(str(path / "tokenizer.json"))
        yes, no = (vocabulary.token_to_id(word) for word in ("yes", "no"))
        module = "sentence_transformers.cross_encoder.modules.LogitScore"
        forward = {"method": "forward", "method_output_name": "logits"}
        files: dict[str, object] = {
            "modules.json": [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.Transformer"},
                {"idx": 1, "name": "1", "path": "1_LogitScore", "type": module},
            ],
            "1_LogitScore/config.json": {
                "true_token_id": yes if true is None else true,
                "false_token_id": no if false == -1 else false,
            },
            "chat_template.jinja": template,
            "sentence_bert_config.json": {
                "transformer_task": "text-generation",
                "modality_config": {"text": forward, "message": forward | {"format": format}},
                "module_output_name": "causal_logits",
                "processing_kwargs": {"chat_template": options},
            },
            "config_sentence_transformers.json": {
                "__version__": {"sentence_transformers": "5.4.0"},
                "activation_fn": "torch.nn.modules.linear.Identity",
                "model_type": "CrossEncoder",
                "default_prompt_name": None if prompt is None else "query",
                "prompts": {} if prompt is None else {"query": prompt},
            },
        }
        for name, content in files.items():
            write(name, content)(path)

    return edit


def answers(**values: Any) -> Edit:
    """Write the layout with other fields of 1_LogitScore/config.json."""
    change = edit_json("1_LogitScore/config.json", lambda settings: settings.update(values))
    return both(sentence_transformers(), change)


def more_answers(path: Path) -> None:
    """Add a second module with other words."""
    write("2_LogitScore/config.json", {"true_token_id": 17, "false_token_id": 18})(path)


def score_head(head: Tensor) -> Edit:
    """Store a score head in place of lm_head, as a conversion to Qwen3ForSequenceClassification does."""
    labels: dict[str, Any] = {"id2label": {str(i): f"LABEL_{i}" for i in range(len(head))}}
    labels["label2id"] = {name: int(i) for i, name in labels["id2label"].items()}
    change = settings(architectures=["Qwen3ForSequenceClassification"], **labels)
    return both(change, without("lm_head"), weights(lambda f: f | {"score.weight": head}))


def st_config(**values: Any) -> Edit:
    """Write config_sentence_transformers.json."""
    return write("config_sentence_transformers.json", values)


def sentence_bert(**values: Any) -> Edit:
    """Write the layout with other fields of sentence_bert_config.json."""
    return both(sentence_transformers(), edit_json("sentence_bert_config.json", lambda v: v.update(values)))


def st_layout(**values: Any) -> Edit:
    """Write the layout with another config_sentence_transformers.json."""
    return both(sentence_transformers(), st_config(**values))


def template(content: str) -> Edit:
    """Write a chat template."""
    return write("chat_template.jinja", content)


def layers(count: int) -> Edit:
    """Change the number of layers in config.json."""
    return settings(num_hidden_layers=count, layer_types=None)


def nothing(path: Path) -> None:
    """Leave the folder as it is."""


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:d479c427\nsize 727\n"
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj."
_HEADS = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
UNTIED, BIASES = {"tied": False}, {"attention_bias": True}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ADAPTER = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Qwen3-Reranker-4B"}
_EMBEDDING = [{"path": "", "type": "x.models.Transformer"}, {"path": "1_Pooling", "type": "x.models.Pooling"}]
_POOLING = both(
    write("modules.json", [{"path": "0_Transformer", "type": "x.Transformer"}, _EMBEDDING[1]]),
    write("1_Pooling/config.json", {}),
)
_STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
_BUG = CARD_TEMPLATE.replace("Given a web search query", "Given a bug")
_BUG_INSTRUCTION = "Given a bug, retrieve relevant passages that answer the query"
_ONLY_USER = "{%- for m in messages if m.role == 'user' -%}{{ m.content }}{%- endfor -%}"
_TWICE = CARD_TEMPLATE.replace("{{ ns.d }}", "{{ ns.d }} {{ ns.d }}")
_LENGTH = CARD_TEMPLATE.replace("{{ ns.d }}", "{{ ns.d | length }} {{ ns.d }}")
_JOINED = CARD_TEMPLATE.replace("\n<Document>: ", "")
_BARE = "{%- for m in messages if m.role == 'document' -%}{{ m.content }}{%- endfor -%} by {{ messages[-2].content }}"
_LAST = _JOINED.replace("{{ ns.d }}", "<|im_end|>{{ ns.d }}").replace(f"{{{{ {SUFFIX!r} }}}}", "")
_ZERO = CARD_TEMPLATE.replace("{{ ns.d }}", "{{ ns.d or 'nothing' }}")
_SHORT = CARD_TEMPLATE.replace("{{ ns.d }}", "{{ ns.d[:9000] }}")
_LOWER = CARD_TEMPLATE.replace("{{ ns.q }}", "{{ ns.q | lower }}")
_LINE = CARD_TEMPLATE.replace("{{ ns.d }}", r"{{ ns.d | replace('\n', ' ') }}")
_DATE = CARD_TEMPLATE.replace("{{ ns.d }}", "{{ strftime_now('%Y') }} {{ ns.d }}")
_PADDED = CARD_TEMPLATE + "<|endoftext|>"
_TRIM = CARD_TEMPLATE.replace("ns.q }}", "ns.q | trim }}")

RIGHT = [
    Variant("float32", nothing),
    Variant("bfloat16", as_type(torch.bfloat16)),
    Variant("float16", as_type(torch.float16)),
    Variant("tied, the head stored too", weights(lambda f: f | {HEAD: f[EMBEDDING]})),
    Variant("tied, only the head stored", renamed(lambda name: name.replace("model.embed_tokens", "lm_head"))),
    Variant("tied, another head stored", weights(lambda f: f | {HEAD: f[EMBEDDING].flip(1)}), warned="NOT tie them"),
    Variant("untied", nothing, base=UNTIED),
    Variant("config of transformers 4.51", old_config),
    Variant("an unused window", settings(sliding_window=4096, use_sliding_window=False, max_window_layers=1)),
    Variant("no architectures", settings(architectures=None)),
    Variant("attention biases", nothing, base=BIASES),
    Variant("yarn, rope_type", old_rope(rope_type="yarn")),
    Variant("yarn, type", old_rope(type="yarn")),
    Variant("yarn, rope_parameters", rope(rope_type="yarn", factor=4.0)),
    Variant("linear", rope(rope_type="linear", factor=2.0)),
    Variant("llama3", rope(rope_type="llama3", factor=8.0, **_LLAMA3)),
    Variant("shards", shards),
    Variant("stale shards beside the file", stale_shards),
    Variant("more rows than tokens", embedding_rows(50)),
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
    Variant("stored padding and truncation", tokenizer(pad)),
    Variant("a token appended to every text", tokenizer(append_token)),
    Variant("a generic chat template", write("chat_template.jinja", GENERIC_TEMPLATE)),
    Variant("a generic chat template in the tokenizer", tokenizer_config(chat_template=GENERIC_TEMPLATE)),
    Variant("the sentence-transformers layout", sentence_transformers()),
    Variant("the layout without a template", both(sentence_transformers(), removed("chat_template.jinja"))),
    Variant("an instruction in its files", sentence_transformers(prompt="Find code"), instruction="Find code"),
    Variant("an instruction in its template", sentence_transformers(template=_BUG), instruction=_BUG_INSTRUCTION),
    Variant("another activation", st_layout(activation_fn="x.ScaledSigmoid"), warned="the activation ScaledSigmoid"),
    Variant("a prompt for blank texts", sentence_transformers(template=_ZERO), warned="for blank texts"),
    Variant(
        "a shorter limit of its own",
        both(sentence_transformers(), edit_json("sentence_bert_config.json", lambda v: v.update(max_seq_length=512))),
        warned="MAX_SEQ_LENGTH=8192 is above 512",
    ),
    Variant("a shorter limit of the tokenizer", tokenizer_config(model_max_length=1024), warned="above 1024"),
    Variant("silu under its other name", settings(hidden_act="swish")),
    Variant("a pointer in an unread file", write("eval_results.json", POINTER)),
    Variant("a dead link in an unread file", lambda path: (path / "tool.jinja").symlink_to("nowhere")),
    Variant("a prefix before the first word", tokenizer_config(add_prefix_space=True)),
    Variant("files of a training", both(write("optimizer.pt", b"x"), write("checkpoint-9/config.json", "{}"))),
    Variant("a value head", and_tensor("v_head.summary.weight"), warned="v_head.summary.weight"),
    Variant("a stored frequency", and_tensor("model.layers.0.self_attn.rotary_emb.inv_freq")),
    Variant("an adapter in its own folder", write("adapter/adapter_config.json", _ADAPTER), warned="LoRA adapter"),
    Variant("few positions", settings(max_position_embeddings=4096), warned="max_position_embeddings"),
]

WRONG = [
    # Missing weights: transformers would fill them with random numbers.
    Variant("untied, no head", without("lm_head"), "lm_head.weight: save the head", base=UNTIED),
    Variant("tied, but not in the config", settings(tie_word_embeddings=False), '"tie_word_embeddings": true'),
    Variant("names of PEFT", renamed("base_model.model.{}".format), "begin with 'base_model.model.'"),
    Variant("names of torch.compile", renamed("_orig_mod.{}".format), "begin with '_orig_mod.'"),
    Variant("names of DataParallel", renamed("module.{}".format), "begin with 'module.'"),
    Variant("names of two wrappers", renamed("_orig_mod.module.{}".format), "begin with '_orig_mod.module.'"),
    Variant("names of a bare backbone", renamed(lambda name: name.removeprefix("model.")), "lack 'model.'"),
    Variant("more layers in the config", layers(5), "hold 3 layers and config.json has 5"),
    Variant("a layer missing in the middle", without("layers.1."), "not saved or not downloaded"),
    Variant("a norm missing", without("layers.2.self_attn.q_norm"), "model.layers.2.self_attn.q_norm.weight"),
    Variant("an embedding missing", without("embed_tokens"), "model.embed_tokens.weight"),
    Variant("a head of zeros", weights(lambda f: f | {HEAD: 0 * f[HEAD]}), "the same for every document", base=UNTIED),
    # Extra weights: transformers would ignore them.
    Variant("more layers in the file", layers(2), "config.json has 2 layers only"),
    Variant("a score head", and_tensor("score.weight", 1, WIDTH), "without this head"),
    Variant("a classifier", and_tensor("classifier.bias"), "classifier.bias"),
    Variant("biases that the config lacks", settings(attention_bias=False), "attention_bias", base=BIASES),
    Variant("scales of FP8", and_tensor(UP + "weight_scale"), "quantised weights"),
    Variant("scales of fine-grained FP8", and_tensor(UP + "weight_scale_inv"), "quantised weights"),
    Variant("GPTQ without its config", and_tensor(UP + "qweight"), "quantised weights"),
    Variant("MLX without its config", and_tensor(UP + "biases"), "quantised weights"),
    Variant("int8 without its config", as_type(torch.int8, "up_proj"), "I8"),
    Variant("int4 without its config", as_type(torch.uint8, "up_proj"), "U8"),
    Variant("float8 without its config", as_type(torch.float8_e4m3fn, "down_proj"), "F8_E4M3"),
    Variant("an adapter in the weights", and_tensor("model.layers.0.self_attn.q_proj.lora_A.weight"), "not merged"),
    Variant("names of an adapter", renamed(lambda name: name.replace("q_proj.", "q_proj.base_layer.")), "not merged"),
    Variant("a head under another name", and_tensor("rank_head.weight", 1, WIDTH), "without this head"),
    Variant("a tuned prompt", and_tensor("prompt_encoder.embedding.weight"), "not merged"),
    Variant("other names", weights(lambda f: {f"layers.{i}": t for i, t in enumerate(f.values())}), "another program"),
    # Shapes.
    Variant("another width", settings(intermediate_size=96), f"model.layers.0.mlp.gate_proj.weight is [48, {WIDTH}]"),
    Variant("no head_dim", settings(head_dim=None), "head_dim"),
    Variant("another vocabulary", settings(vocab_size=9000), "vocab_size"),
    Variant("an embedding without rows for the control tokens", embedding_rows(-3), "vocab_size"),
    # config.json: other architectures and other computations.
    Variant("an architecture that is not a list", settings(architectures=5), "architecture 5"),
    Variant("an epsilon of zero", settings(rms_norm_eps=0), "rms_norm_eps=0"),
    Variant("a theta as text", rope(rope_theta="1e6"), "rope_theta=1e6"),
    Variant("a factor as text", rope(rope_type="yarn", factor="4"), "factor=4"),
    Variant("NaN in the config", write("config.json", '{"rms_norm_eps": NaN}'), "holds NaN"),
    Variant("impossible sizes", settings(num_attention_heads=0), "config.json"),
    Variant("a padding token without a row", settings(pad_token_id=10**6), "config.json"),
    Variant("rope dynamic", rope(rope_type="dynamic", factor=2.0), "'dynamic'"),
    Variant("rope longrope", old_rope(rope_type="longrope"), "'longrope'"),
    Variant("rope dynamic, old spelling", old_rope(type="dynamic"), "'dynamic'"),
    Variant("rope by layer", settings(rope_parameters={"full_attention": {"factor": 2.0}}), "has a rope_parameters"),
    Variant("rope on a part of the head", rope(partial_rotary_factor=0.5), "partial_"),
    Variant("yarn without a factor", rope(rope_type="yarn"), "config.json"),
    Variant("no rope_theta", settings(rope_parameters=None), "no rope_theta"),
    Variant("gelu", settings(hidden_act="gelu"), "hidden_act='gelu'"),
    Variant("no causal mask", settings(is_causal=False), "is_causal=False"),
    Variant("both directions", settings(use_bidirectional_attention=True), "use_bidirectional_attention"),
    Variant("a sliding window", settings(use_sliding_window=True), "use_sliding_window"),
    Variant("sliding layers", settings(layer_types=["sliding_attention", *["full_attention"] * 2]), "sliding"),
    Variant("a field of another type", settings(hidden_size="96"), "hidden_size"),
    Variant("auto_map that is null", edit_json("config.json", lambda v: v.update(auto_map=None)), "remove auto_map"),
    Variant("code in the checkpoint", settings(auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map"),
    Variant("weights under another name", settings(transformers_weights="other.safetensors"), "transformers_weights"),
    Variant("an embedding model's architecture", settings(architectures=["Qwen3Model"]), "without its head"),
    Variant("a lost score head", settings(architectures=["Qwen3ForSequenceClassification"]), "score.weight"),
    Variant("a score head of zeros", score_head(torch.zeros(1, WIDTH)), "the same for every document"),
    Variant("a score head of equal labels", score_head(torch.ones(2, WIDTH)), "the same for every document"),
    Variant("three labels", score_head(torch.ones(3, WIDTH)), "has 3 labels"),
    Variant("reversed labels", both(score_head(_HEADS), settings(id2label={0: "yes", 1: "no"})), "the first is 'yes'"),
    Variant(
        "a score head after padding",
        both(score_head(_HEADS), template(_PADDED), settings(pad_token_id=ENTRIES)),
        "ends in <|endoftext|>, its padding",
    ),
    Variant("a score head and words", both(score_head(torch.ones(1, WIDTH)), sentence_transformers()), "remove the"),
    Variant("listwise", settings(architectures=["JinaForRanking"]), "JinaForRanking"),
    Variant("another model", settings(model_type="gemma"), "model_type is 'gemma'"),
    Variant("Qwen2 without a prompt", qwen2, "does not say what its prompt is"),
    Variant("no model_type", settings(model_type=None), "model_type is None"),
    # Quantised checkpoints and adapters.
    *(
        Variant(f"quantised: {method}", settings(quantization_config={"quant_method": method}), f"({method})")
        for method in "gptq awq bitsandbytes torchao modelopt hqq quark".split()
    ),
    Variant("quantised by nothing", settings(quantization_config={}), "(unknown method)"),
    Variant("quantised by an unknown method", settings(quantization_config={"bits": 4}), "(unknown method)"),
    Variant("old bitsandbytes", settings(quantization_config={"load_in_8bit": True}), "(bitsandbytes)"),
    Variant("old compressed-tensors", settings(compression_config={"quant_method": "sparseml"}), "(sparseml)"),
    Variant("MLX", settings(quantization={"bits": 8, "group_size": 64}), "(MLX)"),
    Variant("AutoGPTQ's file", write("quantize_config.json", {"bits": 4}), "(GPTQ)"),
    Variant("ModelOpt's file", write("hf_quant_config.json", {}), "(NVIDIA ModelOpt)"),
    Variant("half an adapter beside the base", write("adapter_config.json", _ADAPTER), "without adapter_model"),
    Variant("the other half", write("adapter_model.safetensors", b"x"), "without adapter_config.json"),
    Variant(
        "a pickled adapter", both(write("adapter_config.json", _ADAPTER), write("adapter_model.bin", b"x")), "pickle"
    ),
    # Tokenizers.
    Variant("a normalizer that strips", backend(lambda v: v.update(normalizer=_STRIP)), "other tokens than"),
    Variant("dropout of merges", backend(lambda v: v["model"].update(dropout=0.01)), "dropout"),
    Variant("control tokens split", tokenizer_config(split_special_tokens=True), "split"),
    Variant("truncated merges", truncated_merges, "it is truncated"),
    Variant("a tokenizer without <think>", without_think, "splits <think> into"),
    # The sentence-transformers layout.
    Variant("an embedding model", write("modules.json", _EMBEDDING), "embedding model (Pooling"),
    Variant("an embedding model in folders", both(into("0_Transformer"), _POOLING), "holds no config.json"),
    Variant(
        "an embedding model's own file", st_config(similarity_fn_name="cosine"), "embedding model (config_sentence"
    ),
    Variant("a pooling beside it", write("1_Pooling/config.json", {}), "embedding model (Pooling"),
    Variant("answers without modules", write("1_LogitScore/config.json", {"true_token_id": 3}), "no chat template"),
    Variant("answers missing", both(sentence_transformers(), removed("1_LogitScore/config.json")), "cannot read"),
    Variant("another module", write("modules.json", [{"path": "2_Dense", "type": "x.Dense"}]), "'Dense'"),
    Variant("modules that are an object", write("modules.json", "{}"), "not a JSON array"),
    Variant("words beyond the vocabulary", sentence_transformers(true=10**6), "scores the token 1000000"),
    Variant("equal words", sentence_transformers(true=17, false=17), "true_token_id=17 and false_token_id=17"),
    Variant("a word as text", answers(true_token_id="yes"), "true_token_id=yes"),
    Variant("another input of the words", answers(module_input_name="logits"), "'logits', not causal_logits"),
    Variant("two modules of words", both(sentence_transformers(), more_answers), "different tokens"),
    Variant("a template that trims", sentence_transformers(template=_TRIM), "changes or omits the query"),
    Variant("a template without documents", sentence_transformers(template=_ONLY_USER), "changes or omits the query"),
    Variant("a template that repeats", sentence_transformers(template=_TWICE), "repeats the document"),
    Variant("a template that counts", sentence_transformers(template=_LENGTH), "a different prompt for other texts"),
    Variant("a template that cuts", sentence_transformers(template=_SHORT), "a different prompt for other texts"),
    Variant("a template in lower case", sentence_transformers(template=_LOWER), "changes or omits the query"),
    Variant("a template that joins lines", sentence_transformers(template=_LINE), "changes or omits the document"),
    Variant("a template with the date", sentence_transformers(template=_DATE), "it writes the date into the prompt"),
    Variant("options that are a list", sentence_bert(processing_kwargs=[1]), "has processing_kwargs, which is not"),
    Variant("template options that are a list", sentence_bert(processing_kwargs={"chat_template": [1]}), "has chat_te"),
    Variant("texts without a prompt", sentence_bert(modality_config={"text": {}}), "scores texts without a prompt"),
    Variant(
        "a word beyond all numbers", both(answers(true_token_id=2**70), removed("chat_template.jinja")), "vocab_size"
    ),
    Variant("nothing between the texts", sentence_transformers(template=_JOINED), "no text between query and document"),
    Variant("nothing before the texts", sentence_transformers(template=_BARE), "no text before its texts"),
    Variant("nothing after a control token but the document", sentence_transformers(template=_LAST), "ends with the"),
    Variant("a template that fails", template("{{ 1 / 0 }} 'query' 'document'"), "cannot be rendered"),
    Variant("a template that reaches out", template("{{ ''.__class__.__mro__ }} 'query' 'document'"), "template"),
    Variant("lower case", write("sentence_bert_config.json", {"do_lower_case": True}), "do_lower_case"),
    Variant("a default prompt that is a list", st_config(default_prompt_name=[]), "no prompt for"),
    Variant("no default prompt", st_layout(default_prompt_name="q"), "no prompt for its default_prompt_name"),
    # Incomplete downloads and mounts.
    Variant("pointer: weights", write("model.safetensors", POINTER), "git lfs pull"),
    Variant("pointer: tokenizer", write("tokenizer.json", POINTER), "git lfs pull"),
    Variant("pointer: config", write("config.json", POINTER), "git lfs pull"),
    Variant("dead link: config", dead_link("config.json"), "which does not exist here"),
    Variant("dead link: weights", dead_link("model.safetensors"), "which does not exist here"),
    Variant("dead link: tokenizer", dead_link("tokenizer.json"), "which does not exist here"),
    Variant("a folder in place of the weights", folder_in_place_of("model.safetensors"), "is a folder and not a file"),
    Variant("no config", removed("config.json"), "holds no config.json: download the "),
    Variant("no weights", removed("model.safetensors"), "holds no *.safetensors: download the "),
    Variant("no tokenizer", removed("tokenizer.json"), "holds no tokenizer"),
    Variant("a vocabulary without merges", both(slow_tokenizer, removed("merges.txt")), "no merges.txt"),
    Variant("in a folder within", into("checkpoint-100"), "checkpoint-100 does"),
    Variant("shards without index", both(shards, removed(INDEX)), "the index of the shards is missing"),
    Variant("a shard missing", both(shards, removed("model-00002-of-00002.safetensors")), "1 of 2 shards are missing"),
    Variant("an index of pickles", both(shards, write(INDEX, {"weight_map": {"x": "x.bin"}})), "nothing else is read"),
    Variant("an index that is an array", both(shards, write(INDEX, "[]")), "not a JSON object"),
    Variant("mark: config", marked("config.json"), "byte order mark"),
    Variant("mark: tokenizer", marked("tokenizer.json"), "byte order mark"),
    Variant("config in UTF-16", write("config.json", "{}".encode("utf-16")), "byte order mark"),
    Variant("config truncated", write("config.json", "{"), "not JSON"),
    Variant("config of an array", write("config.json", "[]"), "not a JSON object"),
    Variant("config empty", write("config.json", ""), "not JSON"),
    Variant("tokenizer truncated", write("tokenizer.json", '{"model": '), "not JSON"),
    Variant("tokenizer of another program", write("tokenizer.json", "{}"), "no usable tokenizer"),
    Variant("weights truncated", write("model.safetensors", b"\x10\0\0\0\0\0\0\0{"), "broken or half downloaded"),
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
