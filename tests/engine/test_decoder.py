"""The packed decoder against transformers' forward passes, and what it holds in memory while it is loaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from reranker import ModelLoadError
from reranker.engine.attention import SdpaAttention
from reranker.engine.batch import pack
from reranker.engine.checkpoint.inventory import check_weights
from reranker.engine.checkpoint.weights import EMBEDDING, HEAD, Weights
from reranker.engine.families.decoder import Decoder
from reranker.engine.families.loader import Loader
from reranker.engine.footprint import weight_bytes
from reranker.engine.precision import FLOAT8, QUANTIZED
from reranker.engine.quantized import quantize
from reranker.types import EncodedRequest, Slice
from tests.conftest import make_model
from tests.engine.checkpoints import tensors

CPU = torch.device("cpu")
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
]


def qwen2(**settings: Any) -> Any:
    """A model with random weights; norms are not 1 and biases not 0, so that one that is left out shows."""
    return made(Qwen2ForCausalLM, Qwen2Config(**settings))


def qwen3(**settings: Any) -> Any:
    return made(Qwen3ForCausalLM, Qwen3Config(**settings))


def made(kind: Callable[[Any], Any], config: PretrainedConfig) -> Any:
    model = kind(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.1 if weight.ndim == 2 else 0.3)
    return model


def shape(rng: random.Random, tied: bool) -> dict[str, Any]:
    groups, head = rng.choice([1, 2, 3]), 2 * rng.randint(4, 20)
    heads = groups * rng.randint(1, 4)
    return {
        "vocab_size": rng.randint(50, 300),
        "hidden_size": heads * head,
        "intermediate_size": rng.randint(20, 200),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "max_position_embeddings": 4096,
        "rope_parameters": rng.choice(ROPES) | {"rope_theta": rng.choice([1e4, 1e6])},
        "tie_word_embeddings": tied,
    }


def decoder(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(Loader(Weights(folder), CPU, dtype, dtype), config)


@torch.inference_mode()
def packed(backbone: Decoder, head: Tensor, requests: list[EncodedRequest], cached: int = 0) -> Tensor:
    batch = pack([Slice(request, 0, len(request.documents)) for request in requests], static_prefix_len=cached)
    return backbone.hidden(batch, SdpaAttention, backbone.eager) @ head


@torch.inference_mode()
def one_by_one(whole: Any, requests: list[EncodedRequest]) -> Tensor:
    pairs = [torch.tensor([request.prefix + document]) for request in requests for document in request.documents]
    last = torch.stack([whole(input_ids=pair).logits[0, -1] for pair in pairs])
    return last[:, 5] - last[:, 7]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "bias"), [(qwen2, True), (qwen3, False), (qwen3, True)])
def test_packed_logits_are_those_of_transformers(kind: Any, bias: bool, tied: bool, tmp_path: Path) -> None:
    rng = random.Random(f"{kind.__name__} {bias} {tied}")
    for trial in range(4):
        torch.manual_seed(trial)
        settings = shape(rng, tied)
        if kind is qwen3:
            settings |= {"attention_bias": bias, "head_dim": 2 * rng.randint(4, 20)}
        whole, folder = kind(**settings), tmp_path / str(trial)
        whole.save_pretrained(str(folder))
        weights = Weights(folder)
        check_weights(weights, whole.config, AutoModelForCausalLM)
        assert any(name.endswith("q_proj.bias") for name in weights.stored) is bias
        assert (HEAD in weights.stored) is not tied

        def words(longest: int, size: int = whole.config.vocab_size) -> list[int]:
            return [rng.randrange(size) for _ in range(rng.randint(1, longest))]

        start = words(9)
        requests = [EncodedRequest(words(30), [words(40) for _ in range(rng.randint(1, 4))]) for _ in range(3)]
        backbone = decoder(folder, whole.config)
        rows = weights.tensor(HEAD)[[5, 7]].float()
        assert packed(backbone, rows[0] - rows[1], requests).tolist() == pytest.approx(
            one_by_one(whole, requests).tolist(), abs=1e-5
        )
        backbone.cache_prefix(start, SdpaAttention)
        prefixed = [
            EncodedRequest(start + request.prefix, request.documents, cached_prefix_len=len(start))
            for request in requests
        ]
        assert packed(backbone, rows[0] - rows[1], prefixed, len(start)).tolist() == pytest.approx(
            one_by_one(whole, prefixed).tolist(), abs=1e-5
        )


def test_a_window_is_computed_where_it_is_off_and_refused_where_it_is_on(tmp_path: Path) -> None:
    settings = shape(random.Random(3), tied=True) | {"num_hidden_layers": 2, "sliding_window": 4}
    off = qwen2(**settings, use_sliding_window=False, max_window_layers=1)
    off.save_pretrained(str(tmp_path))
    request = EncodedRequest([1, 2, 3, 4, 5, 6], [[7, 8, 9]])
    rows = Weights(tmp_path).tensor(HEAD)[[5, 7]].float()
    assert packed(decoder(tmp_path, off.config), rows[0] - rows[1], [request]).tolist() == pytest.approx(
        one_by_one(off, [request]).tolist(), abs=1e-5
    )
    on = Qwen2Config(**settings, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ModelLoadError, match=r"config\.json has layers with sliding attention") as caught:
        decoder(tmp_path, on)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: str(rope["rope_type"]))
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_what_transformers_loads(
    dtype: torch.dtype, stored: torch.dtype, rope: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    settings = shape(random.Random(1), tied=False) | {"rope_parameters": rope | {"rope_theta": 1e6}}
    qwen3(**settings, attention_bias=True).to(stored).save_pretrained(str(tmp_path))
    whole: Any = Qwen3ForCausalLM.from_pretrained(str(tmp_path), dtype=dtype)
    backbone = decoder(tmp_path, whole.config, dtype)
    ours, theirs = dict(backbone.decoder.named_parameters()), dict(whole.model.named_parameters())
    joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, weight in ours.items():
        part = name.split(".")[-2]
        expected = torch.cat([theirs.pop(name.replace(part, other)) for other in joined.get(part, (part,))])
        assert torch.equal(weight.to(dtype), expected), name
    assert not theirs
    assert ours["embed_tokens.weight"].dtype.itemsize == min(stored.itemsize, dtype.itemsize)
    buffers, rotary = dict(backbone.decoder.rotary_emb.named_buffers()), whole.model.rotary_emb
    assert buffers.keys() == dict(rotary.named_buffers()).keys() >= {"inv_freq"}
    for name, buffer in rotary.named_buffers():
        assert buffer.dtype is buffers[name].dtype is torch.float32
        assert torch.equal(buffers[name], buffer)
    assert backbone.decoder.rotary_emb.attention_scaling == rotary.attention_scaling


def test_a_parameter_that_is_not_computed_is_refused(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    class Gated(Qwen3MLP):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)  # type: ignore[no-untyped-call]
            self.scale = nn.Parameter(torch.ones(1))

    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.Qwen3MLP", Gated)
    with pytest.raises(ModelLoadError, match=r"has layers\.0\.mlp\.scale, which is not computed"):
        decoder(model_path, Qwen3Config.from_pretrained(str(model_path)))


class Live(TorchDispatchMode):
    """The bytes of all tensors that are alive, views counted once; `peak`: their largest sum after an operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {self._key(tensor) for tensor in self._real([args, kwargs])}
        for tensor in self._real(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    @staticmethod
    def _real(tree: Any) -> list[Tensor]:
        return [tensor for tensor in tree_leaves(tree) if isinstance(tensor, Tensor) and not tensor.is_meta]

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, FLOAT8, torch.int8])
def test_loading_needs_the_final_size_and_at_most_one_layer(
    precision: torch.dtype, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "m", layers=8, vocab_size=8192, hidden_size=128, intermediate_size=384, tied=False)
    tensors(folder, lambda found: {name: tensor.to(stored) for name, tensor in found.items()})
    weights, config = Weights(folder), Qwen3Config.from_pretrained(str(folder))
    read = weights.tensor

    def unseen(name: str) -> Tensor:
        with _disable_current_modes():  # a view of the file, which the system drops when it needs the memory
            return read(name)

    monkeypatch.setattr(weights, "tensor", unseen)
    quantized, dtype = precision in QUANTIZED, QUANTIZED.get(precision, precision)
    with Live() as live:
        backbone = Decoder(
            Loader(
                weights,
                CPU,
                stored if quantized else dtype,
                dtype,
                lambda linear, names: quantize(linear, precision) if quantized else linear,
            ),
            config,
        )
    held = (*backbone.decoder.parameters(), *backbone.decoder.buffers())
    final = sum(tensor.nbytes for tensor in held)
    assert live.bytes == final
    layer = sum(tensor.numel for name, tensor in weights.stored.items() if ".layers.0." in name)
    if quantized:
        assert final < live.peak < final + 2 * 4 * layer, "twice a layer in float32"
    else:
        assert live.peak == final, "each weight is copied into its final place"
    frequencies = sum(buffer.nbytes for buffer in backbone.decoder.rotary_emb.buffers())
    packed = 8 * layer if precision is torch.int8 else 0  # FBGEMM's memory, which is no tensor's
    peak = live.peak + packed
    assert peak - frequencies <= sum(weight_bytes(weights, precision, dtype)) < 1.1 * peak
    assert weights.stored[EMBEDDING].numel * min(stored.itemsize, dtype.itemsize) < final
