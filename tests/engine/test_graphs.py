from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reranker import Scorer
from reranker.engine import acceleration, attention
from reranker.engine.acceleration import (
    TOLERANCE,
    TOLERANCE_QUANTIZED,
    differs,
    record_passes,
    sample,
    slower,
    tolerance,
)
from reranker.engine.attention import SdpaAttention, VarlenAttention
from reranker.engine.batch import PackedBatch, pack, pad
from reranker.engine.families.base import LayerFns
from reranker.engine.graphs import MAX_TOKENS, SIZES, Graphs, bucket, fits
from reranker.engine.model import Model
from reranker.types import EncodedRequest, Slice
from tests.engine.test_attention import by_the_book

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def scorer(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    """The model with the GPU's attention and a stand-in for the kernel that follows its documentation."""
    monkeypatch.setattr(attention, "varlen_attn", by_the_book)
    scorer = Scorer.load(model_path, device="cpu", precision="float32")
    scorer.model.kernel = VarlenAttention
    return scorer


def batch_of(rng: random.Random, scorer: Scorer) -> PackedBatch:
    slices = []
    for _ in range(rng.randrange(1, 4)):
        documents = [[rng.randrange(2000) for _ in range(rng.randrange(1, 60))] for _ in range(rng.randrange(1, 5))]
        prefix = [rng.randrange(2000) for _ in range(rng.randrange(1, 40))]
        kept = rng.choice((0, 3, len(scorer.model.static_prefix)))
        request = EncodedRequest([*scorer.model.static_prefix[:kept], *prefix], documents, cached_prefix_len=kept)
        slices.append(Slice(request, 0, len(documents)))
    batch = scorer.pack(slices)
    assert isinstance(batch, PackedBatch)
    return batch


def test_padding_to_a_bucket_changes_no_score(scorer: Scorer) -> None:
    rng = random.Random(21)
    padded = 0
    for _ in range(15):
        batch = batch_of(rng, scorer)
        shape = bucket(batch.tokens)
        if not fits(batch, shape):
            continue
        padded += 1
        larger = pad(batch, shape)
        assert len(larger.input_ids) == shape.tokens >= batch.tokens
        actual = scorer.model.forward(larger)
        assert len(actual) == shape.documents
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(actual[: batch.shape.documents], scorer.model.forward(batch), atol=1e-5, rtol=0)
    assert padded >= 8


def test_a_batch_that_fills_its_bucket_is_padded_with_nothing(scorer: Scorer) -> None:
    batch = scorer.pack([Slice(EncodedRequest([5] * 28, [list(range(60)), list(range(40))]), 0, 2)])
    assert isinstance(batch, PackedBatch)
    assert batch.tokens == 128
    actual = scorer.model.forward(pad(batch, bucket(128)))[:2]
    torch.testing.assert_close(actual, scorer.model.forward(batch), atol=1e-5, rtol=0)


def test_buckets_cover_the_small_batches_and_nothing_else() -> None:
    assert [bucket(tokens).tokens for tokens in (1, 128, 129, 2048)] == [128, 128, 256, 2048]
    assert bucket(MAX_TOKENS).tokens == SIZES[-1]
    assert bucket(MAX_TOKENS + 1).tokens not in SIZES
    assert all(bucket(size).documents <= attention.MAX_LAST_QUERIES for size in SIZES)
    words = [1] * 130
    ten = pack([Slice(EncodedRequest([1] * 80, [words] * 10), 0, 10)])
    assert fits(ten, bucket(ten.tokens))
    for prefix, documents in (
        ([1] * 80, [words[:3]] * 60),
        ([1] * 80, [words * 5]),
        ([1] * 600, [words] * 9),
        ([1] * 400, [words[:20]] * 9),
    ):
        odd = pack([Slice(EncodedRequest(prefix, documents), 0, len(documents))])
        assert not fits(odd, bucket(odd.tokens))


@pytest.mark.parametrize("static_prefix", [1, 60, 512])
def test_samples_fit_their_buckets(scorer: Scorer, static_prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer.model, "static_prefix", [7] * static_prefix)
    for tokens in (*SIZES, *(size - 16 for size in SIZES)):
        batch = sample(tokens, scorer.model)
        assert tokens - 16 < batch.tokens <= tokens
        assert fits(batch, bucket(tokens))


def test_the_comparison_finds_a_wrong_and_a_slow_path() -> None:
    right = torch.randn(4, 32)
    assert differs(lambda: right * 1.01, lambda: right) == ""
    assert slower(lambda: right * 1.01, lambda: right) == ""
    wrong = right.clone()
    wrong[3] = wrong[3].roll(1)
    assert "hidden states differ" in differs(lambda: wrong, lambda: right)
    assert "hidden states differ" in differs(lambda: right * float("nan"), lambda: right)
    # One document of eight that is wrong hides behind the mean of coarse ones.
    many = torch.randn(8, 32)
    one = torch.cat([many[:1].roll(1), many[1:]])
    assert ((one - many).norm(dim=-1) / many.norm(dim=-1)).mean() < TOLERANCE_QUANTIZED
    assert "hidden states differ" in differs(lambda: one, lambda: many, TOLERANCE_QUANTIZED)
    assert "hidden states differ" in differs(lambda: right * (1 + 2 * TOLERANCE), lambda: right)
    assert "does not accept" in differs(lambda: None, lambda: right)

    def slow() -> torch.Tensor:
        time.sleep(0.05)
        return right

    assert "slower" in slower(slow, lambda: right)


class Recorder:
    """CUDA graphs on the CPU: a replay reads the input and writes the output of the recorded call, as on a GPU."""

    def __init__(self, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = scorer.model
        self.calls: list[tuple[PackedBatch, torch.Tensor]] = []
        self.replays: list[int] = []
        self.wrong: set[int] = set()
        """Sizes in tokens whose replays give wrong results."""
        recorder, nothing, hidden = self, contextlib.nullcontext(), Model.hidden

        class Graph:
            call = -1

            def replay(self) -> None:
                batch, out = recorder.calls[self.call]
                recorder.replays.append(batch.tokens)
                out.copy_(hidden(recorder.model, batch).roll(int(batch.tokens in recorder.wrong), 1))

        @contextlib.contextmanager
        def record(graph: Graph, **_: object) -> Iterator[None]:
            yield
            graph.call = len(recorder.calls) - 1

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, fake in {
            "graph_pool_handle": lambda: (0, 0),
            "Stream": lambda device: stream,
            "stream": lambda _: nothing,
            "current_stream": lambda *_: stream,
            "device": lambda _: nothing,
            "CUDAGraph": Graph,
            "graph": record,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(Model, "hidden", lambda model, batch, *stages: self.note(batch, hidden(model, batch)))

    def note(self, batch: PackedBatch, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append((batch, hidden))
        return hidden


@pytest.fixture
def recorder(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(scorer, monkeypatch)


def test_a_replay_is_the_pass_of_its_input_batch(scorer: Scorer, recorder: Recorder) -> None:
    graphs = Graphs(recorder.model.hidden, torch.device("cpu"))
    for size in (512, 256, 128):
        graphs.record(sample(size, recorder.model))
    rng = random.Random(22)
    for _ in range(40):
        batch = batch_of(rng, scorer)
        actual, shape = graphs.replay(batch), bucket(batch.tokens)
        assert (actual is None) == (shape.tokens not in (128, 256, 512) or not fits(batch, shape))
        if actual is not None:
            assert recorder.replays[-1] == shape.tokens
            torch.testing.assert_close(actual, recorder.model.hidden(batch), atol=1e-5, rtol=1e-5)
    assert set(recorder.replays) == {128, 256, 512}
    graphs.drop(256)
    assert len(graphs) == 2
    assert graphs.replay(sample(250, recorder.model)) is None


def test_scores_come_from_replays_where_a_recording_fits(scorer: Scorer, recorder: Recorder) -> None:
    rng = random.Random(24)
    batches = [batch_of(rng, scorer) for _ in range(20)]
    reference = [scorer.score(batch) for batch in batches]
    scorer.model.graphs = Graphs(recorder.model.hidden, torch.device("cpu"))
    scorer.model.graphs.record(sample(256, scorer.model))
    for batch, logits in zip(batches, reference, strict=True):
        assert scorer.score(batch) == pytest.approx(logits, abs=1e-4)
    assert 1 <= len(recorder.replays) < 20


@pytest.fixture
def quick(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A recorder whose replays never count as slower, and never take too long: here a replay is an eager pass."""
    monkeypatch.setattr(acceleration, "slower", lambda fast, eager: "")
    monkeypatch.setattr(acceleration, "_RECORD_SECONDS", math.inf)
    return recorder


def test_every_size_that_passes_is_recorded(quick: Recorder) -> None:
    assert record_passes(quick.model) == ""
    assert quick.model.graphs is not None
    assert len(quick.model.graphs) == len(SIZES)


def test_one_wrong_recording_rules_out_all(quick: Recorder) -> None:
    quick.wrong.add(256)
    assert record_passes(quick.model).startswith("256 tokens: hidden states differ")
    assert quick.model.graphs is None


def test_a_size_slower_than_the_compiled_layers_is_dropped(quick: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not slower than the eager path only: the replay takes the place of the compiled layers."""
    compiled = LayerFns(*quick.model.backbone.eager)
    replaced: list[Callable[[], torch.Tensor]] = []

    def slower(fast: Callable[[], torch.Tensor | None], reference: Callable[[], torch.Tensor]) -> str:
        replaced.append(reference)
        return "slower" if len(replaced) == 1 else ""  # the largest, which is recorded first

    monkeypatch.setattr(quick.model, "compiled", compiled, raising=False)
    monkeypatch.setattr(acceleration, "slower", slower)
    assert record_passes(quick.model) == ""
    for reference in replaced:
        assert isinstance(reference, functools.partial)
        assert reference.func == quick.model.hidden
        assert reference.args[1] is compiled
    assert quick.model.graphs is not None
    assert len(quick.model.graphs) == len(SIZES) - 1
    assert quick.model.graphs.replay(sample(2040, quick.model)) is None
    assert quick.model.graphs.replay(sample(127, quick.model)) is not None


def test_a_slow_recording_keeps_the_small_sizes(quick: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr(acceleration, "_RECORD_SECONDS", 15.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 4.0 * next(now))
    assert record_passes(quick.model) == ""
    assert quick.model.graphs is not None
    assert 2 <= len(quick.model.graphs) < 6
    assert quick.model.graphs.replay(sample(127, quick.model)) is not None


def test_where_attention_runs_segment_by_segment_nothing_is_recorded(quick: Recorder) -> None:
    quick.model.kernel = SdpaAttention
    assert "segment by segment" in record_passes(quick.model)
    assert quick.calls == []


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float8"])
def test_replays_equal_the_eager_path(model_path: Path, precision: str) -> None:
    scorer = Scorer.load(model_path, device="cuda", precision=precision)
    model = scorer.model
    graphs = Graphs(lambda batch: model.hidden(batch, model.compiled), model.device)
    for size in (512, 256, 128):
        graphs.record(sample(size, model))
    rng = random.Random(22)
    replayed = 0
    for _ in range(40):
        batch = batch_of(rng, scorer)
        actual = graphs.replay(batch)
        if actual is None:
            continue
        replayed += 1
        reference = model.hidden(batch.to(model.device))
        assert ((actual - reference).norm(dim=-1) / reference.norm(dim=-1)).max() < tolerance(model)
    assert replayed >= 10


@pytest.mark.cuda
@CUDA
def test_a_pass_synchronises_once(model_path: Path) -> None:
    """In `tolist`; none from the packed batch to the logits on the device."""
    scorer = Scorer.load(model_path, device="cuda", precision="bfloat16")
    small = scorer.pack(sample(512, scorer.model).slices)
    large = scorer.pack(sample(4096, scorer.model).slices)
    for batch in (small, large):
        scorer.score(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert isinstance(batch, PackedBatch)
            logits = scorer.model.forward(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(logits).all()


@pytest.mark.cuda
@CUDA
def test_this_gpu_uses_both_paths(model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The fallback keeps scores right without them, so only this test notices the loss of speed."""
    with caplog.at_level("INFO"):
        model = Scorer.load(model_path, device="cuda", precision="bfloat16").model
    assert model.graphs is not None, caplog.text
    assert len(model.graphs) == len(SIZES)
    assert model.compiled is not None, caplog.text
