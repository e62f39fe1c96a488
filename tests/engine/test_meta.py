"""The engine on `meta` tensors, whose operators apply the rules of CUDA's: widths, types, layouts and keywords.

Nothing is computed: a wrong number is found by the other tests, a call that a GPU would refuse by these. A size that
depended on the data, and so would wait for the GPU, is refused too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config

from reranker.engine import attention
from reranker.engine.attention import Attention, VarlenAttention
from reranker.engine.batch import PackedBatch, pack, pad
from reranker.engine.families import decoder
from reranker.engine.families.base import Head, LayerFns
from reranker.engine.families.loader import Loader
from reranker.engine.graphs import bucket, fits
from reranker.engine.grouped import GroupedAttention
from reranker.engine.model import Model
from reranker.engine.precision import FLOAT8, QUANTIZED
from reranker.engine.quantized import Float8Linear
from reranker.types import EncodedRequest, Slice

META = torch.device("meta")
PREFIX = 60
WIDTHS: dict[str, tuple[Any, tuple[int, int, int, int, int]]] = {
    "Qwen3 0.6B": (Qwen3Config, (1024, 3072, 16, 8, 128)),
    "Qwen3 4B": (Qwen3Config, (2560, 9728, 32, 8, 128)),
    "Qwen3 8B": (Qwen3Config, (4096, 12288, 32, 8, 128)),
    "Qwen2 0.5B": (Qwen2Config, (896, 4864, 14, 2, 64)),
    "Qwen2 1.5B": (Qwen2Config, (1536, 8960, 12, 2, 128)),
    "Qwen2 7B": (Qwen2Config, (3584, 18944, 28, 4, 128)),
}
"""Size -> hidden, intermediate, heads, key/value heads, head dimension: those of the published checkpoints."""


@pytest.fixture(autouse=True)
def _loads_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded parameter is told from a missing one by its device, which is the same here."""
    monkeypatch.setattr(decoder, "_refuse_unread", lambda decoder: None)


def config_of(size: str) -> PretrainedConfig:
    kind, (hidden, intermediate, heads, groups, head) = WIDTHS[size]
    config: PretrainedConfig = kind(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    return config


def weights_of(config: PretrainedConfig) -> Any:
    """The tensors of a checkpoint in bfloat16, without their numbers."""
    with META:
        stored = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    return SimpleNamespace(path=Path("meta"), tensor=lambda name: stored[name])


def loaded(size: str, precision: torch.dtype, kernel: type[Attention]) -> Model:
    config, dtype = config_of(size), QUANTIZED.get(precision, precision)

    def wrap(linear: nn.Linear, names: Sequence[str]) -> nn.Module:
        return Float8Linear(linear) if precision is FLOAT8 else linear

    backbone = decoder.Decoder(Loader(weights_of(config), META, dtype, dtype, wrap), config)
    model = Model(backbone, Head(torch.empty(config.hidden_size, device=META)), META, precision, kernel)
    model.cache_prefix([1] * PREFIX)
    return model


def batch_of(rng: random.Random, documents: int) -> PackedBatch:
    """Two requests, one of which begins with the static prefix; documents shorter and longer than their prefixes."""
    slices = []
    for cached in (PREFIX, 0):
        texts = [[1] * rng.randrange(4, 150) for _ in range(documents)]
        slices.append(Slice(EncodedRequest([1] * (cached + 30), texts, cached_prefix_len=cached), 0, documents))
    return pack(slices, static_prefix_len=PREFIX)


def batches(kernel: type[Attention]) -> Iterator[PackedBatch]:
    """A batch as it is, and padded to the shape of its recording where passes are recorded."""
    batch = batch_of(random.Random(4), 4)
    yield batch
    if kernel is VarlenAttention:
        shape = bucket(batch.tokens)
        assert fits(batch, shape)
        yield pad(batch, shape)


def same_type(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The products of meta tensors take mixed types; CUDA's do not."""
    assert isinstance(linear, nn.Linear)
    assert inputs[0].dtype == linear.weight.dtype


def check(model: Model) -> None:
    assert isinstance(model.backbone, decoder.Decoder)
    for module in model.backbone.decoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(same_type)
    for batch in batches(model.kernel):
        logits = model.forward(batch)
        assert (logits.device, logits.dtype, len(logits)) == (META, torch.float32, batch.shape.documents)


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, FLOAT8], ids=str)
def test_a_gpu_takes_every_call(size: str, precision: torch.dtype) -> None:
    check(loaded(size, precision, VarlenAttention))


@pytest.mark.parametrize("size", ["Qwen3 4B", "Qwen2 1.5B"])
@pytest.mark.parametrize("precision", [torch.float16, torch.float32], ids=str)
def test_a_gpu_without_the_varlen_kernel_takes_every_call(size: str, precision: torch.dtype) -> None:
    check(loaded(size, precision, GroupedAttention))


@pytest.mark.parametrize(
    ("size", "precision"), [("Qwen3 4B", torch.bfloat16), ("Qwen3 4B", FLOAT8), ("Qwen2 1.5B", torch.bfloat16)], ids=str
)
def test_the_halves_of_a_layer_are_one_graph_each(size: str, precision: torch.dtype) -> None:
    """As `compile_layer_fns` compiles them, but for the code that is generated: no break, no second compilation."""
    model = loaded(size, precision, VarlenAttention)
    torch._dynamo.reset()
    counters.clear()
    traced: Any = partial(torch.compile, dynamic=True, fullgraph=True, backend="eager")
    halves = LayerFns(*map(traced, model.backbone.eager))
    with torch.inference_mode():
        model.hidden(batch_of(random.Random(5), 9).to(META), halves)
        assert counters["stats"]["unique_graphs"] == 2
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in batches(model.kernel):
                model.hidden(batch.to(META), halves)
    assert not counters["graph_break"]


def test_a_call_that_a_gpu_refuses_is_refused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: without a keyword, with another torch's, and for a width that float8 does not take."""
    model = loaded("Qwen3 0.6B", torch.bfloat16, VarlenAttention)
    options = attention._OPTIONS
    assert options is not None
    for wrong in ({**options, "enable_gqa": False}, {"is_causal": True}, {**options, "unknown": 1}):
        monkeypatch.setattr(attention, "_OPTIONS", wrong)
        with pytest.raises((TypeError, ValueError)):
            check(model)
    odd = Float8Linear(nn.Linear(100, 64, device=META, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="16"):
        odd(torch.empty(8, 100, device=META, dtype=torch.bfloat16))
    unscaled = odd.weight[:, :64].t()
    values: Tensor = torch.empty(8, 64, device=META, dtype=FLOAT8)
    with pytest.raises(RuntimeError):
        torch._scaled_mm(values, unscaled, scale_a=odd.scale, scale_b=odd.scale, out_dtype=torch.bfloat16)
