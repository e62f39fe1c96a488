"""The seam for model families: config.json chooses one, and another template and head need nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from reranker import ModelLoadError, Scorer
from reranker.engine import families
from reranker.engine.checkpoint.weights import HEAD, Weights
from reranker.engine.families import family_of
from reranker.engine.families.base import Head
from reranker.engine.families.qwen3 import TEMPLATE, Qwen3
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
            "the architecture Qwen3Model of {} is saved without its head",
        ),
        (
            {"model_type": "bert", "architectures": ["BertModel"]},
            "the architecture BertModel of {} is saved without its head",
        ),
        ({"model_type": "new"}, "{} (new) is gte-multilingual-reranker or a model like it, which is computed by code"),
        (
            {"model_type": "xlm-roberta", "architectures": ["XLMRobertaForSequenceClassification"], "auto_map": {}},
            "{} is jina-reranker-v2 or a model like it, which is computed by code",
        ),
        (
            {"model_type": "qwen3", "architectures": ["JinaForRanking"]},
            "{} (JinaForRanking) is jina-reranker-v3 or a model like it, which reads all documents",
        ),
        (
            {"model_type": "llama_bidirec", "architectures": ["LlamaBidirectionalForSequenceClassification"]},
            "{} (llama_bidirec) is llama-nemotron-rerank or a model like it, which is computed by code",
        ),
        ({"model_type": "gemma"}, "model_type is 'gemma', not 'bert' or 'modernbert' or 'qwen2' or "),
        ({}, "model_type is None, not 'bert' or 'modernbert' or 'qwen2' or 'qwen3' or 'xlm-roberta'"),
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

    def head(self, weights: Weights) -> Head:
        rows = weights.tensor(HEAD)[[5, 7]].float()
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
