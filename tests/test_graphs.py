from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from reranker import Scorer
from reranker.engine import attention
from reranker.engine.attention import VarlenAttention
from reranker.engine.graphs import MOST_TOKENS, SIZES, Graphs, bucket, fits
from reranker.engine.packing import PackedBatch, pack, pad
from reranker.engine.speedup import TOLERANCE, compare, sample, tolerance
from reranker.types import EncodedRequest, Slice
from tests.test_attention import by_the_book

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def scorer(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    """The model with the GPU's attention, whose kernel is replaced by one that follows its documentation."""
    monkeypatch.setattr(attention, "varlen_attn", by_the_book)
    scorer = Scorer.load(model_path, device="cpu", precision="float32")
    scorer.model.kernel = VarlenAttention
    return scorer


def batch_of(rng: random.Random) -> PackedBatch:
    slices = []
    for _ in range(rng.randrange(1, 4)):
        documents = [[rng.randrange(2000) for _ in range(rng.randrange(1, 60))] for _ in range(rng.randrange(1, 5))]
        prefix = [rng.randrange(2000) for _ in range(rng.randrange(1, 40))]
        slices.append(Slice(EncodedRequest(prefix, documents), 0, len(documents)))
    return pack(slices)


def test_padding_to_a_bucket_changes_no_score(scorer: Scorer) -> None:
    rng = random.Random(21)
    padded = 0
    for _ in range(15):
        batch = batch_of(rng)
        shape = bucket(batch.tokens)
        if not fits(batch, shape):
            continue
        padded += 1
        larger = pad(batch, shape)
        assert len(larger.input_ids) == shape.tokens >= batch.tokens
        got = scorer.model.forward(larger)
        assert len(got) == shape.documents
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got[: batch.shape.documents], scorer.model.forward(batch), atol=1e-5, rtol=0)
    assert padded >= 8


def test_a_batch_that_fills_its_bucket_is_padded_with_nothing(scorer: Scorer) -> None:
    batch = pack([Slice(EncodedRequest([5] * 28, [list(range(60)), list(range(40))]), 0, 2)])
    assert batch.tokens == 128
    got = scorer.model.forward(pad(batch, bucket(128)))[:2]
    torch.testing.assert_close(got, scorer.model.forward(batch), atol=1e-5, rtol=0)


def test_buckets_cover_the_small_batches_and_nothing_else() -> None:
    assert [bucket(tokens).tokens for tokens in (1, 128, 129, 2048)] == [128, 128, 256, 2048]
    assert bucket(MOST_TOKENS).tokens == SIZES[-1]
    assert bucket(MOST_TOKENS + 1).tokens not in SIZES
    assert all(bucket(size).documents <= attention._MOST_LAST for size in SIZES)
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


@pytest.mark.parametrize("tokens", [*SIZES, *(size - 16 for size in SIZES)])
def test_what_is_recorded_and_compared_fits_its_bucket(tokens: int) -> None:
    batch = sample(tokens, 2000)
    assert tokens - 16 < batch.tokens <= tokens
    assert fits(batch, bucket(tokens))


def test_the_comparison_finds_a_wrong_and_a_slow_way() -> None:
    right = torch.randn(4, 32)
    assert compare(lambda: right * 1.01, lambda: right) == ""
    wrong = right.clone()
    wrong[3] = wrong[3].roll(1)
    assert "differ by" in compare(lambda: wrong, lambda: right)
    assert "differ by" in compare(lambda: right * float("nan"), lambda: right)
    assert "differ by" in compare(lambda: right * (1 + 2 * TOLERANCE), lambda: right)
    assert "does not take" in compare(lambda: None, lambda: right)

    def slow() -> torch.Tensor:
        time.sleep(0.05)
        return right

    assert "slower" in compare(slow, lambda: right)


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float8"])
def test_replays_equal_the_plain_way(model_path: Path, precision: str) -> None:
    scorer = Scorer.load(model_path, device="cuda", precision=precision)
    model = scorer.model
    graphs = Graphs(lambda batch: model.hidden(batch, model.stages), model.device)
    for size in (512, 256, 128):
        graphs.record(sample(size, 2000))
    rng = random.Random(22)
    replayed = 0
    for _ in range(40):
        batch = batch_of(rng)
        got = graphs.replay(batch)
        if got is None:
            continue
        replayed += 1
        wanted = model.hidden(batch.to(model.device))
        assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max() < tolerance(model)
    assert replayed >= 10


@pytest.mark.cuda
@CUDA
def test_a_pass_synchronises_once(model_path: Path) -> None:
    """From the packed batch to the logits on the device there is none; `tolist` is the one."""
    scorer = Scorer.load(model_path, device="cuda", precision="bfloat16")
    small = scorer.pack(sample(512, 2000).slices)
    large = scorer.pack(sample(4096, 2000).slices)
    for batch in (small, large):
        scorer.score(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = scorer.model.forward(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(logits).all()


@pytest.mark.cuda
@CUDA
def test_the_paths_are_taken_on_this_gpu(model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not a matter of right or wrong, which the fall-back sees to, but of speed: here it would be lost in silence."""
    with caplog.at_level("INFO"):
        model = Scorer.load(model_path, device="cuda", precision="bfloat16").model
    assert model.graphs is not None, caplog.text
    assert len(model.graphs) == len(SIZES)
