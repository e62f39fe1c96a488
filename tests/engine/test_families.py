"""The seam for model families: config.json chooses one, and another template and head need nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3ForCausalLM

from benchmarks.card import Card
from reranker import ModelLoadError, Scorer
from reranker.engine import families
from reranker.engine.families import family_of, qwen3
from reranker.engine.families.base import Backbone, Head, LayerFns, Wrap
from reranker.engine.families.qwen3 import TEMPLATE, Qwen3, Qwen3Backbone
from reranker.engine.scores import sigmoid
from reranker.engine.template import Slot, Template
from reranker.types import RerankRequest, Slice
from tests.conftest import DEMO

TOKENIZER = AutoTokenizer.from_pretrained(str(DEMO))


@pytest.mark.parametrize("architectures", [None, [], ["Qwen3ForCausalLM"], ["Other", "Qwen3ForCausalLM"]])
def test_the_family_is_chosen_by_config_json(architectures: list[str] | None) -> None:
    assert family_of(DEMO, {"model_type": "qwen3", "architectures": architectures}) is Qwen3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "qwen3", "architectures": ["Other"]},
            "the architecture Other of {} is not served: only Qwen3For",
        ),
        (
            {"model_type": "qwen3", "architectures": "Qwen3ForCausalLM"},
            "the architecture Qwen3ForCausalLM of {} is not",
        ),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3Model"]},
            "the architecture Qwen3Model of {} is saved without",
        ),
        (
            {"model_type": "bert", "architectures": ["BertModel"]},
            "model_type is 'bert', not 'qwen3': only Qwen3-Reranker",
        ),
        ({}, "model_type is None, not 'qwen3'"),
    ],
)
def test_a_model_of_no_family_is_refused_in_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        family_of(DEMO, settings)
    assert str(caught.value).startswith(message.format(DEMO))
    assert "\n" not in str(caught.value)


class Another(Qwen3):
    """The same layers with another prompt, other answer tokens, a bias and a scale."""

    card = Template(
        instructed=(
            "<|im_start|>user\n",
            Slot.INSTRUCTION,
            "\nquery: ",
            Slot.QUERY,
            "\ndocument: ",
            Slot.DOCUMENT,
            "\nRelevant?<|im_end|>\n<|im_start|>assistant\n",
        ),
        plain=None,
        instruction="Which document is relevant?",
        control_tokens=TEMPLATE.control_tokens,
    )

    def head(self, model: PreTrainedModel) -> Head:
        rows = model.get_output_embeddings().weight.detach()[[5, 7]].float()
        return Head((rows[0] - rows[1]) / 2, bias=0.25)


def test_another_prompt_and_head_need_a_class_and_a_line_of_the_registry(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, ("qwen3", "Qwen3ForCausalLM"), Another)
    scorer = Scorer.load(model_path, device="cpu", precision="float32")
    documents = ["a cat is an animal", "bread"]
    request = scorer.encode(RerankRequest("what is a cat?", documents))
    assert request.cached_prefix_len == len(scorer.prompt.static_prefix) > 2
    logits = scorer.score(scorer.pack([Slice(request, 0, 2)]))
    whole = Qwen3ForCausalLM.from_pretrained(str(model_path), dtype=torch.float32).eval()
    for document, logit in zip(documents, logits, strict=True):
        text = Another.card.render(Another.card.instruction, "what is a cat?", document)
        ids = TOKENIZER(text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            last = whole(**ids).logits[0, -1]
        assert logit == pytest.approx(float(last[5] - last[7]) / 2 + 0.25, abs=1e-4)


class Qwen2Backbone(Qwen3Backbone):
    """A decoder whose queries and keys have biases and no norms."""

    @staticmethod
    def before(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = layer.self_attn
        heads = attn.qkv_proj(qwen3._norm(layer.input_layernorm, x)).unflatten(-1, (-1, attn.head_dim))
        groups = attn.config.num_key_value_heads
        q, k, v = heads.split([attn.config.num_attention_heads, groups, groups], dim=1)
        q, k = qwen3._rotate(q, cos, sin), qwen3._rotate(k, cos, sin)
        if attn.cached_k is None:
            return q, k, v
        return q, torch.cat([attn.cached_k, k]), torch.cat([attn.cached_v, v])

    eager = LayerFns(before, qwen3.after_attention)


class Qwen2(Qwen3):
    """The prompt and the answers of Qwen3-Reranker with another decoder."""

    def backbone(self, model: PreTrainedModel, dtype: torch.dtype, wrap: Wrap) -> Backbone:
        return Qwen2Backbone(model.model, dtype, wrap)


def test_another_decoder_needs_a_class_and_a_line_of_the_registry(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(model_path, tmp_path / "m"))
    config = Qwen2Config.from_dict(
        {"vocab_size": len(TOKENIZER), "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}
        | {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    )
    torch.manual_seed(7)
    whole = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.1)
    whole.save_pretrained(str(path))
    with pytest.raises(ModelLoadError, match="model_type is 'qwen2', not 'qwen3'"):
        Scorer.load(path, device="cpu", precision="float32")
    monkeypatch.setitem(families.FAMILIES, ("qwen2", "Qwen2ForCausalLM"), Qwen2)
    scorer, card = Scorer.load(path, device="cpu", precision="float32"), Card(path)
    documents = ["a cat is an animal", "bread", "a long document about cats " * 20]
    for document, probability in zip(documents, scorer.rerank("what is a cat?", documents), strict=True):
        assert probability == pytest.approx(sigmoid(card.logit("what is a cat?", document)), abs=1e-5)
