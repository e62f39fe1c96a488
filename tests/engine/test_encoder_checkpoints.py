"""Encoders as people publish, convert and damage them: each is scored as transformers scores it, or refused by name."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import BertConfig

from reranker import ModelLoadError
from reranker.engine.families import family_of
from reranker.engine.families.labels import check_labels
from reranker.types import RerankRequest, Slice
from tests.engine.checkpoints import (
    ZERANK_TEMPLATE,
    Edit,
    and_tensor,
    append_token,
    as_type,
    both,
    edit_json,
    pad,
    removed,
    renamed,
    settings,
    shards,
    template,
    tokenizer,
    tokenizer_config,
    weights,
    without,
    write,
)
from tests.engine.encoders import KINDS, POSITIONS, texts_with
from tests.engine.pairs import Pairs
from tests.engine.quantization import ALL, FORMS, Form, plain_twin, quantize
from tests.engine.test_encoders import Loaded, check, load, requests


def old_modernbert(path: Path) -> None:
    """config.json as transformers 4 writes it: thetas and the distance of global layers, no list of layers."""
    absent = dict.fromkeys(("rope_parameters", "layer_types", "dtype"))
    old = {"global_attn_every_n_layers": 2, "global_rope_theta": 500.0, "local_rope_theta": 20.0}
    unread = {"position_embedding_type": "absolute", "reference_compile": False, "repad_logits_with_grad": False}
    settings(**absent, **old, **unread, torch_dtype="float32")(path)


def old_bert(path: Path) -> None:
    """config.json as transformers 4 writes it, with the fields of sentence-transformers."""
    old = {"position_embedding_type": "absolute", "use_cache": True, "gradient_checkpointing": False}
    activation = "torch.nn.modules.linear.Identity"
    settings(**old, dtype=None, torch_dtype="float32", sbert_ce_default_activation_function=activation)(path)


def old_buffers(root: str) -> Edit:
    """Add the buffers that transformers before 4.31 stored."""
    rows = torch.arange(POSITIONS)[None]
    return weights(lambda f: f | {f"{root}.embeddings.{n}": rows * 1 for n in ("position_ids", "token_type_ids")})


def metaspace_alone(path: Path) -> None:
    """tokenizer.json of bge-reranker-v2-m3: spaces are joined by the normalizer, and no word is split before."""

    def change(words: Tokenizer) -> None:
        parts = [normalizers.Replace("\n", " "), normalizers.Replace("\t", " "), normalizers.NFKC()]
        words.normalizer = normalizers.Sequence(parts)
        words.pre_tokenizer = pre_tokenizers.Metaspace()

    both(tokenizer(change), tokenizer_config(tokenizer_class="PreTrainedTokenizerFast"))(path)


def st_layout(**options: Any) -> Edit:
    """The files of sentence-transformers 5.4 and newer."""
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    modality = {"text": {"method": "forward", "method_output_name": "logits"}}
    model = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity", "prompts": {}}
    transformer = {"transformer_task": "sequence-classification", "modality_config": modality, **options}
    return both(
        write("modules.json", [module]),
        write("sentence_bert_config.json", transformer),
        write("config_sentence_transformers.json", {**model, "default_prompt_name": None}),
    )


class Served(NamedTuple):
    """A variant with the same scores as transformers'."""

    name: str
    kind: str
    edit: Edit
    length: int = POSITIONS
    """Tokens of its longest pair."""


SERVED = [
    Served("an old config", "modernbert-mean", old_modernbert),
    Served("an old config", "bert", old_bert),
    Served("old buffers", "bert", old_buffers("bert")),
    Served("old buffers", "xlm-roberta", old_buffers("roberta")),
    Served("heads of BERT's training", "bert", and_tensor("cls.predictions.bias", 32)),
    Served("a pooler that is not used", "xlm-roberta", and_tensor("roberta.pooler.dense.weight", 32, 32)),
    *(Served("float16", kind, as_type(torch.float16)) for kind in KINDS),
    Served("bfloat16", "modernbert-cls", as_type(torch.bfloat16)),
    Served("shards", "bert", shards),
    Served("no architectures", "xlm-roberta", settings(architectures=None)),
    Served("stored padding and truncation", "bert", tokenizer(pad)),
    Served("stored padding and truncation", "xlm-roberta", tokenizer(pad)),
    Served("a tokenizer without word boundaries", "xlm-roberta", metaspace_alone),
    Served("an old tokenizer class", "modernbert-mean", tokenizer_config(tokenizer_class="PreTrainedTokenizerFast")),
    Served("case is kept", "bert", tokenizer_config(do_lower_case=False)),
    Served("sentence-transformers", "bert", st_layout()),
    Served("sentence-transformers, a shorter length", "xlm-roberta", st_layout(max_seq_length=100), 100),
    Served("no length in the tokenizer", "xlm-roberta", tokenizer_config(model_max_length=10**30)),
    Served("no length in the tokenizer", "bert", tokenizer_config(model_max_length=None)),
    Served("a length with a point", "bert", tokenizer_config(model_max_length=90.0), 90),
    Served("a length above the positions", "modernbert-cls", tokenizer_config(model_max_length=8192)),
    Served("a shorter length in the tokenizer", "bert", tokenizer_config(model_max_length=90), 90),
    Served("one label named", "bert", settings(id2label={"0": "relevance"}, label2id={"relevance": 0})),
    Served("another activation", "bert", settings(hidden_act="relu")),
    Served("another activation", "modernbert-cls", settings(hidden_activation="silu", classifier_activation="relu")),
    Served("no token types", "bert", tokenizer_config(model_input_names=["input_ids", "attention_mask"])),
]


QUICK = ("old buffers", "a shorter length in the tokenizer")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, id=f"{v.kind}: {v.name}", marks=[] if v.name in QUICK else pytest.mark.slow) for v in SERVED],
)
def test_it_is_scored_as_transformers_does(variant: Served, tmp_path: Path) -> None:
    folder = KINDS[variant.kind](tmp_path / "m")
    variant.edit(folder)
    loaded = Loaded(folder, load(folder), Pairs(folder))
    if variant.name == "no token types":
        loaded.reference.token_types = False
    group = requests(random.Random(variant.name), 3)
    if variant.length == POSITIONS:
        check(loaded, group)
    assert loaded.scorer.info.max_seq_length == variant.length
    special = [token for token in loaded.special if token in loaded.reference.tokenizer.get_vocab()]
    for text in texts_with(special)[:8]:
        found = loaded.scorer.encode(RerankRequest("x", [text]))
        assert found.prefix + found.documents[0] == loaded.reference.ids("x", text)
    long = "a game of chess " * 200
    found = loaded.scorer.encode(RerankRequest("x", [long]))
    assert found.prefix + found.documents[0] == loaded.reference.plain("x", long, variant.length)


@pytest.mark.parametrize("kind", ["xlm-roberta", "bert", "modernbert-cls"])
def test_a_tokenizer_that_transformers_builds_in_another_way_is_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """XLM-RoBERTa's class does not read the normalizer of tokenizer.json."""

    def change(words: Tokenizer) -> None:
        words.normalizer = normalizers.Sequence([normalizers.Lowercase()])

    folder = KINDS[kind](tmp_path / "m")
    load(folder)
    assert "TEI's may differ" not in caplog.text
    tokenizer(change)(folder)
    load(folder)
    assert ("get other tokens from XLMRobertaTokenizer" in caplog.text) is (kind == "xlm-roberta")


class Refused(NamedTuple):
    """A variant that is refused, and words of the error."""

    name: str
    kind: str
    edit: Edit
    words: str
    labels: int = 1


def classifier(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return weights(lambda f: {n: change(t) if n == "classifier.weight" else t for n, t in f.items()})


_POOLING: Any = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
_ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 4, "target_modules": ["query"]}
_MODULES: Any = [*_POOLING, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
REFUSED = [
    Refused("an embedding model's architecture", "bert", settings(architectures=["BertModel"]), "without its head"),
    Refused("an embedding model's layout", "xlm-roberta", write("modules.json", _POOLING), "embedding model (Pooling"),
    Refused(
        "ettin-reranker",
        "modernbert-cls",
        both(write("modules.json", _MODULES), settings(architectures=["ModernBertModel"])),
        "a score head in these modules (ettin-reranker) is not read",
    ),
    Refused("a head in modules", "bert", write("modules.json", _MODULES), "Pooling and Dense in modules.json"),
    Refused("an embedding model's weights", "bert", without("classifier"), "embedding model: use a reranker"),
    Refused("another task", "bert", settings(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
    Refused("a lost pooler", "bert", without("pooler"), "bert.pooler.dense.weight: the head was not saved"),
    Refused("a lost layer", "modernbert-cls", without("layers.4."), "hold 4 layers and config.json has 5"),
    Refused("another layer", "bert", settings(num_hidden_layers=1), "config.json has 1 layers only"),
    Refused("three labels", "bert", lambda path: None, "3 labels", 3),
    Refused(
        "reversed labels",
        "xlm-roberta",
        settings(id2label={"0": "relevant", "1": "other"}),
        "the first is 'relevant'",
        2,
    ),
    Refused(
        "reversed labels in another order",
        "bert",
        settings(id2label={"1": "not_entailment", "0": "entailment"}),
        "the first is 'entailment'",
        2,
    ),
    Refused("a head of zeros", "bert", classifier(torch.zeros_like), "the same for every document"),
    Refused("two equal labels", "bert", classifier(torch.ones_like), "same for every document", 2),
    Refused("a decoder", "bert", settings(is_decoder=True), "is_decoder=True"),
    Refused("relative positions", "bert", settings(position_embedding_type="relative_key"), "'relative_key'"),
    Refused("ALiBi", "bert", settings(position_embedding_type="alibi"), "'alibi'"),
    Refused("another pooling", "modernbert-cls", settings(classifier_pooling="max"), "classifier_pooling='max'"),
    Refused(
        "another rope",
        "modernbert-cls",
        settings(rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0}}),
        "'yarn'",
    ),
    Refused("old names of norms", "bert", renamed(lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma")), "gamma"),
    Refused("a wrapper", "xlm-roberta", renamed(lambda n: f"module.{n}"), "begin with 'module.'"),
    Refused("no root", "bert", renamed(lambda n: n.removeprefix("bert.")), "lack 'bert.'"),
    Refused("an adapter", "bert", write("adapter_config.json", _ADAPTER), "adapter"),
    Refused("quantised", "bert", settings(quantization_config={"quant_method": "bitsandbytes"}), "(bitsandbytes)"),
    Refused("rounded weights", "bert", as_type(torch.int8, "query.weight"), "I8"),
    Refused("code in the folder", "bert", settings(auto_map={"AutoModel": "x.Model"}), "auto_map"),
    Refused("jina-reranker-v2", "xlm-roberta", settings(auto_map={"AutoModel": "x.Model"}), "code in its checkpoint"),
    Refused(
        "a prompt",
        "bert",
        template(ZERANK_TEMPLATE),
        "m/chat_template.jinja has a prompt (chat_template), but an encoder reads pairs",
    ),
    Refused(
        "a prompt in the tokenizer's file",
        "bert",
        tokenizer_config(chat_template=ZERANK_TEMPLATE),
        "m/tokenizer_config.json has a prompt (chat_template)",
    ),
    Refused(
        "an instruction",
        "bert",
        write("config_sentence_transformers.json", {"default_prompt_name": "x", "prompts": {"x": "Find it"}}),
        "m/config_sentence_transformers.json has an instruction (default_prompt_name)",
    ),
    Refused(
        "words to score",
        "bert",
        write("1_LogitScore/config.json", {"true_token_id": 9, "false_token_id": 8}),
        "has words to score (true_token_id in the config.json of LogitScore), but an encoder reads pairs",
    ),
    Refused(
        "no padding token",
        "xlm-roberta",
        edit_json("config.json", lambda v: v.update(pad_token_id=None)),
        "has pad_token_id=None: positions start after it",
    ),
    Refused("a length in words", "bert", tokenizer_config(model_max_length="512"), "model_max_length='512'"),
    Refused("a length of true", "bert", tokenizer_config(model_max_length=True), "model_max_length='True'"),
    Refused("a tokenizer without pairs", "modernbert-cls", tokenizer(append_token), "no pair of query and document"),
    Refused(
        "no post-processor",
        "modernbert-cls",
        edit_json("tokenizer.json", lambda v: v.update(post_processor=None)),
        "no pair of query and document",
    ),
    Refused("a smaller vocabulary", "bert", settings(vocab_size=100), "100"),
    Refused("pickles", "bert", both(removed("model.safetensors"), write("pytorch_model.bin", b"x")), "pickles"),
    Refused("no fast tokenizer", "bert", both(removed("tokenizer.json"), write("vocab.txt", "[PAD]")), "no tokenizer"),
]


@pytest.mark.parametrize("variant", [pytest.param(v, id=f"{v.kind}: {v.name}") for v in REFUSED])
def test_it_is_refused(variant: Refused, tmp_path: Path) -> None:
    folder = KINDS[variant.kind](tmp_path / "m", num_labels=variant.labels)
    variant.edit(folder)
    with pytest.raises(ModelLoadError, match=re.escape(variant.words)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_labels_are_read_by_their_keys() -> None:
    for first, second in (("no", "yes"), ("not_entailment", "entailment")):
        check_labels(Path("config.json"), BertConfig(id2label={"1": second, "0": first}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (("new", "NewForSequenceClassification"), "gte-multilingual-reranker"),
        (("xlm-roberta", "XLMRobertaForSequenceClassification"), "jina-reranker-v2"),
        (("xlm-roberta-flash", "XLMRobertaForSequenceClassification"), "jina-reranker-v2"),
        (("llama_bidirec", "LlamaBidirectionalForSequenceClassification"), "nemotron"),
        (("llama", "LlamaBidirectionalForSequenceClassification"), "nemotron"),
        (("bert", "JinaBertForSequenceClassification"), "JinaBertForSequenceClassification"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_code_of_a_checkpoint_is_never_run(config: tuple[str, str], words: str, tmp_path: Path) -> None:
    """The models that people try: each is named, with the reason and a way out."""
    kind, architecture = config
    values = {"model_type": kind, "architectures": [architecture], "auto_map": {"AutoModel": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelLoadError, match=words) as caught:
        family_of(tmp_path, values)
    assert "docs/models.md" in str(caught.value) or "is not served: only" in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["deberta-v2", "electra", "roberta", "distilbert", "camembert", "mpnet", "gemma", "t5"]
)
def test_another_encoder_is_refused_with_the_list(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"model_type is '{kind}', not .*'bert'.*'modernbert'.*'xlm-roberta'"):
        family_of(tmp_path, {"model_type": kind})


ROUNDED = [form for form in FORMS if form.kinds in ALL.values() and not form.cached]


@pytest.mark.slow
@pytest.mark.parametrize("form", ROUNDED, ids=lambda form: form.name)
@pytest.mark.parametrize("kind", ["xlm-roberta", "modernbert-mean"])
def test_8_bit_checkpoints_are_scored_as_their_wide_weights(form: Form, kind: str, tmp_path: Path) -> None:
    [number] = form.kinds.values()
    form = replace(form, kinds={"layer.": number, "layers.": number})
    folder = quantize(KINDS[kind](tmp_path / "wide"), tmp_path / "m", form)
    loaded = Loaded(folder, load(folder), Pairs(plain_twin(folder)))
    check(loaded, requests(random.Random(form.name), 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_w8a8_is_taken_as_it_is_stored(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    form = replace(FORMS[0], kinds={"layer.": "int", "layers.": "int"})
    folder = quantize(KINDS[kind](tmp_path / "wide"), tmp_path / "m", form)
    with caplog.at_level(logging.INFO):
        scorer = load(folder, precision="int8")
    assert "taken as they are stored, in int8" in caplog.text
    reference, documents = Pairs(plain_twin(folder)), ["gzip", "a game of chess", "如何压缩文件", ""]
    encoded = scorer.encode(RerankRequest("how to compress files", documents))
    found = scorer.score(scorer.pack([Slice(encoded, 0, 4)]))
    assert found == pytest.approx([reference.logit("how to compress files", text) for text in documents], abs=0.3)
