"""The encoders of the benchmarks are read by transformers as the models that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.encoder_models import ENCODERS, encoder
from benchmarks.reference import Reference
from benchmarks.workloads import drawn


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ("minilm", "[CLS] the file [SEP] a program [SEP]"),
        ("bge-base", "<s> ▁the ▁file </s> </s> ▁a ▁program </s>"),
    ],
)
def test_a_model_and_its_tokenizer_are_read(
    shape: str, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENCODERS, shape, (24, 48, 1, 2))
    folder = tmp_path / shape
    encoder(shape, folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    pair = tokenizer("the file", "a program")
    assert tokenizer.convert_ids_to_tokens(pair.input_ids) == tokens.split()
    if shape == "minilm":
        assert pair.token_type_ids == [0, 0, 0, 0, 1, 1, 1]
    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    assert model.config.num_labels == 1

    (work,) = drawn(0, 1, 1000)
    work["documents"] = work["documents"][:4]
    reference = Reference(folder, [work])
    padded = tokenizer([work["query"]] * 4, work["documents"], padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        scores = model(**padded).logits.sigmoid()[:, 0].tolist()
    assert reference.apart([scores]) < 1e-6
    assert reference.apart([[0.0, *scores[1:]]]) > 0.001
    assert max(scores) - min(scores) > 0.001, "the scores of documents differ"
