"""Whether the tensors of an encoder are those of its model; those of decoders are in test_checkpoint_config.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, XLMRobertaConfig

from reranker.engine.checkpoint.inventory import check_weights
from reranker.engine.checkpoint.weights import Weights
from reranker.errors import ModelLoadError

Tensors = dict[str, Tensor]
WIDTH = 16
SIZES: dict[str, Any] = {
    "vocab_size": 9,
    "hidden_size": WIDTH,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_labels": 1,
}
BERT = BertConfig(num_hidden_layers=2, max_position_embeddings=8, **SIZES)
XLM_R = XLMRobertaConfig(num_hidden_layers=2, max_position_embeddings=8, **SIZES)


def check(folder: Path, edit: Callable[[Tensors], Tensors], config: BertConfig | XLMRobertaConfig = BERT) -> None:
    tensors = dict(AutoModelForSequenceClassification.from_config(config).state_dict())
    save_file(edit(tensors), folder / "model.safetensors")
    check_weights(Weights(folder), config, AutoModelForSequenceClassification)


def added(**tensors: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda found: found | tensors


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda found: {name: tensor for name, tensor in found.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda found: {name.replace(old, new): tensor for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        (BERT, {"bert.embeddings.position_ids": torch.arange(8)}),
        (BERT, {"bert.embeddings.position_ids": torch.arange(WIDTH)[None]}),  # in the shape of a head
        (BERT, {"cls.seq_relationship.weight": torch.ones(2, WIDTH), "cls.predictions.bias": torch.ones(9)}),
        (XLM_R, {"roberta.pooler.dense.weight": torch.ones(WIDTH, WIDTH)}),
    ],
    ids=[
        "positions as old versions save them",
        "as many positions as hidden_size",
        "heads of the training",
        "a pooler that the head does not read",
    ],
)
def test_tensors_without_a_part_in_the_score_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: BertConfig | XLMRobertaConfig, extra: Tensors
) -> None:
    caplog.set_level("INFO")
    check(tmp_path, added(**extra), config)
    assert f"{len(extra)} weights in {tmp_path} are not part of the model and are ignored" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING" if "cls" in str(extra) else "INFO"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("classifier"), "the first is classifier.weight: the head was not saved, as in an embedding model"),
        (without("pooler"), "the first is bert.pooler.dense.weight: the head was not saved"),
        (without("layer.1."), "the files hold 1 layers and config.json has 2"),
        (without("layer.1.attention"), "a part of the model was not saved or not downloaded"),
        (renamed("LayerNorm.weight", "LayerNorm.gamma"), "norms have their old names, gamma and beta"),
        (renamed("bert.", ""), "the names lack 'bert.', as in an embedding model"),
        (renamed("bert.", "module.bert."), "the names begin with 'module.'"),
        (renamed("", "x"), "are another program's"),
        (added(**{"bert.encoder.layer.2.output.dense.bias": torch.ones(WIDTH)}), "config.json has 2 layers only"),
        (added(**{"bert.encoder.gate": torch.ones(3)}), "would be ignored, the first is bert.encoder.gate"),
        (added(**{"classifier.dense.bias": torch.ones(WIDTH)}), "describes a model without this head"),
    ],
)
def test_other_tensors_are_refused_with_their_cause(
    tmp_path: Path, edit: Callable[[Tensors], Tensors], words: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        check(tmp_path, edit)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
