"""Compare the engine with the model card, one pair at a time: the condition for every optimisation."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.card import Card
from reranker import Scorer
from reranker.engine.batch import PackedBatch
from reranker.engine.budget import split
from reranker.engine.model import Model, load
from reranker.engine.scores import sigmoid
from reranker.errors import DeviceLostError, InvalidRequestError, ModelLoadError, ScoringError
from reranker.types import RerankRequest, Slice
from tests.conftest import DEMO, make_model
from tests.engine.checkpoints import ZERANK_TEMPLATE, sentence_transformers, small_model

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
WORDS = "the a of cat compress 压缩 文件 library 12 <|im_end|> \n 中文 . Python naïve , 🙂 http://x/y?z=1".split(" ")


@pytest.fixture(scope="module")
def scorer(model_path: Path) -> Scorer:
    return Scorer.load(model_path, device="cpu", precision="float32")


def text(rng: random.Random, most: int) -> str:
    # Without control tokens, which the card would parse and the engine must not.
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(most))).replace("<|im_end|>", "im_end")


def requests(rng: random.Random, count: int, documents: int = 7, words: int = 60) -> list[RerankRequest]:
    return [
        RerankRequest(
            text(rng, 40) + "?",
            [text(rng, rng.choice([2, 15, words])) for _ in range(rng.randrange(1, documents))],
            rng.choice([None, None, "Find the code that does it", ""]),
        )
        for _ in range(count)
    ]


def expected(card: Card, request: RerankRequest) -> list[float]:
    extra = () if request.instruction is None else (request.instruction,)
    return [card.logit(request.query, document, *extra) for document in request.documents]


def packed(scorer: Scorer, group: list[RerankRequest]) -> list[list[float]]:
    """Logits of several requests from one forward pass."""
    encoded = [scorer.encode(r) for r in group]
    flat = iter(scorer.score(scorer.pack([Slice(e, 0, len(e.documents)) for e in encoded])))
    return [[next(flat) for _ in e.documents] for e in encoded]


def worst(actual: list[list[float]], reference: list[list[float]]) -> float:
    return max(abs(g - w) for gs, ws in zip(actual, reference, strict=True) for g, w in zip(gs, ws, strict=True))


def test_many_requests_in_one_pass_equal_the_card(scorer: Scorer, card: Card) -> None:
    rng = random.Random(11)
    all_references: list[float] = []
    for _ in range(25):
        group = requests(rng, rng.randrange(1, 6))
        reference = [expected(card, r) for r in group]
        assert worst(packed(scorer, group), reference) < 1e-4
        all_references += [w for ws in reference for w in ws]
    # The model tells documents apart: a wrong computation could not hide behind equal logits.
    assert torch.tensor(all_references).std() > 0.5


def test_the_static_prefix_is_computed_once(scorer: Scorer, card: Card) -> None:
    """At load; a pass computes the rest of each prefix, whatever its instruction shares with the default one."""
    static_prefix = scorer.prompt.static_prefix
    assert scorer.model.static_prefix == static_prefix
    assert len(static_prefix) > 40
    group = [
        RerankRequest("what is it?", ["a cat", "压缩 文件 " * 30], instruction)
        for instruction in (None, "Given a web search", "", "Find the code")
    ]
    encoded = [scorer.encode(request) for request in group]
    assert [e.cached_prefix_len for e in encoded] == sorted((e.cached_prefix_len for e in encoded), reverse=True)
    assert encoded[0].cached_prefix_len == len(static_prefix)
    assert len({e.cached_prefix_len for e in encoded}) >= 3
    batch = scorer.pack([Slice(e, 0, 2) for e in encoded])
    assert batch.tokens == sum(len(e.prefix) - e.cached_prefix_len + sum(map(len, e.documents)) for e in encoded)
    assert worst(packed(scorer, group), [expected(card, r) for r in group]) < 1e-4


def test_requests_of_one_query_share_its_prefix(scorer: Scorer, card: Card) -> None:
    documents = ["a cat", "压缩 文件 " * 30, "", "bread"]
    parts = [RerankRequest("what is it?", documents[i::2], "Find the code") for i in range(2)]
    group = [parts[0], RerankRequest("what is it?", ["a dog"]), parts[1]]
    encoded = [scorer.encode(request) for request in group]
    batch = scorer.pack([Slice(e, 0, len(e.documents)) for e in encoded])
    twice = len(encoded[2].prefix) - encoded[2].cached_prefix_len
    assert batch.tokens == sum(Slice(e, 0, len(e.documents)).tokens for e in encoded) - twice
    assert worst(packed(scorer, group), [expected(card, r) for r in group]) < 1e-4


def test_long_documents_and_long_queries_equal_the_card(scorer: Scorer, card: Card) -> None:
    rng = random.Random(12)
    group = [
        RerankRequest("short", [text(rng, 900) + " end", "x"]),
        RerankRequest(text(rng, 700) + " long", ["a", "", text(rng, 30)]),
    ]
    assert worst(packed(scorer, group), [expected(card, r) for r in group]) < 1e-4


@pytest.mark.parametrize(("tokens", "documents"), [(200, 99), (400, 2), (1, 99), (10_000, 1)])
def test_scores_do_not_depend_on_the_budget(scorer: Scorer, card: Card, tokens: int, documents: int) -> None:
    request = requests(random.Random(13), 1, documents=40)[0]
    encoded = scorer.encode(request)
    actual = [x for s in split(encoded, tokens, documents) for x in scorer.score(scorer.pack([s]))]
    assert worst([actual], [expected(card, request)]) < 1e-4


def test_scores_do_not_depend_on_the_rest_of_the_batch(scorer: Scorer) -> None:
    rng = random.Random(14)
    request = requests(rng, 1, documents=20)[0]
    alone = packed(scorer, [request])[0]
    for _ in range(5):
        others = requests(rng, 3)
        assert worst([packed(scorer, [*others, request, *others])[3]], [alone]) < 1e-5


def test_a_truncated_document_keeps_its_suffix_and_equals_the_card(model_path: Path) -> None:
    scorer = Scorer.load(model_path, device="cpu", precision="float32", max_seq_length=200)
    card = Card(model_path, max_length=200)
    request = RerankRequest("what is it?", ["word and 词 " * 300, "short"])
    assert scorer.encode(request).truncated == {0}
    assert worst(packed(scorer, [request]), [expected(card, request)]) < 1e-4


@pytest.mark.parametrize(
    "changes", [{"tied": False}, {"attention_bias": True}, {"num_key_value_heads": 6}, {"layers": 1}]
)
def test_other_shapes_equal_the_card(tmp_path: Path, changes: dict[str, object]) -> None:
    path = make_model(tmp_path / "m", shards=True, **changes)  # type: ignore[arg-type]
    assert len(list(path.glob("*.safetensors"))) > 1
    scorer, card = Scorer.load(path, device="cpu", precision="float32"), Card(path)
    group = requests(random.Random(15), 3)
    assert worst(packed(scorer, group), [expected(card, r) for r in group]) < 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.6), ("float16", 0.08)])
def test_half_precision_stays_near_and_does_not_depend_on_neighbours(
    model_path: Path, card: Card, precision: str, tolerance: float
) -> None:
    """Random weights of this spread give logits of about 4; the tolerance is their rounding error."""
    scorer = Scorer.load(model_path, device="cpu", precision=precision)
    assert scorer.info.precision == precision
    rng = random.Random(16)
    group = requests(rng, 4)
    assert worst(packed(scorer, group), [expected(card, r) for r in group]) < tolerance
    alone = packed(scorer, [group[2]])[0]
    together = packed(scorer, group)[2]
    assert worst([together], [alone]) < tolerance / 2
    order = sorted(range(len(alone)), key=lambda i: -alone[i])
    for better, worse in itertools.pairwise(order):
        assert together[better] > together[worse] - tolerance


def test_rerank_gives_probabilities_in_document_order(scorer: Scorer, card: Card) -> None:
    documents = ["a cat is an animal", "bread", ""]
    scores = scorer.rerank("what is a cat?", documents)
    assert scores == pytest.approx([sigmoid(card.logit("what is a cat?", d)) for d in documents], abs=1e-5)
    with pytest.raises(InvalidRequestError):
        scorer.rerank("word " * 20_000, ["a"])


def test_the_library_needs_no_web_stack(model_path: Path) -> None:
    import subprocess
    import sys

    code = f"""
import sys
from reranker import Scorer
Scorer.load({str(model_path)!r}, device="cpu").rerank("a", ["b"])
print(sorted({{"fastapi", "starlette", "uvicorn", "gunicorn", "pydantic", "config", "app"}} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


class Flaky:
    """The real model on a device that fails the forward passes chosen by a test."""

    def __init__(self, scorer: Scorer, fails: object) -> None:
        self.model, self.fails, self.passes = scorer.model, fails, list[int]()

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        self.passes.append(batch.tokens)
        error = self.fails(batch)  # type: ignore[operator]
        if error is not None:
            raise error
        return self.model.forward(batch)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp"'),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    ],
)
def test_out_of_memory_halves_the_budget_and_still_scores(model_path: Path, error: RuntimeError) -> None:
    scorer = Scorer.load(model_path, device="cpu", max_batch_tokens=8192)
    request = RerankRequest("what?", ["some words of a document " * 20] * 40)
    expected = packed(scorer, [request])
    flaky = Flaky(scorer, lambda batch: error if batch.tokens > 2000 else None)
    scorer.model = flaky  # type: ignore[assignment]
    assert worst(packed(scorer, [request]), expected) < 1e-5
    assert max(flaky.passes) > 2000
    assert 1024 <= scorer.max_batch_tokens <= 2000


def test_one_document_that_never_fits_is_an_error(model_path: Path) -> None:
    scorer = Scorer.load(model_path, device="cpu")
    scorer.model = Flaky(scorer, lambda batch: torch.OutOfMemoryError("CUDA out of memory"))  # type: ignore[assignment]
    with pytest.raises(ScoringError, match="does not fit"):
        scorer.rerank("a", ["b", "c"])


def test_out_of_memory_never_raises_a_small_budget(model_path: Path) -> None:
    scorer = Scorer.load(model_path, device="cpu", max_batch_tokens=300)
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory")
    scorer.model = Flaky(scorer, lambda batch: out_of_memory if len(batch.last) > 1 else None)  # type: ignore[assignment]
    assert len(scorer.rerank("a", ["b", "c"])) == 2
    assert scorer.max_batch_tokens <= 300


def test_out_of_memory_in_the_warm_up_does_not_blame_the_weights(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Model, batch: PackedBatch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Model, "forward", fail)
    with pytest.raises(ModelLoadError, match="the weights fit, but no forward pass"):
        Scorer.load(model_path, device="cpu", precision="bfloat16")


def test_a_precision_that_failed_is_freed_before_the_next_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier: list[Any] = []
    alive: list[bool] = []

    def watched(*args: Any) -> Model:
        gc.collect()
        alive.extend(reference() is not None for reference in earlier)
        model = load(*args)
        earlier.append(weakref.ref(model.backbone))
        return model

    path = make_model(tmp_path / "m", std=100.0)
    monkeypatch.setattr("reranker.engine.scorer.load", watched)
    assert Scorer.load(path, device="cpu", precision="float16").info.precision == "float32"
    assert alive == [False]


def test_an_instruction_without_room_is_a_start_up_error(model_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="leaves no room for a query and a document in MAX_SEQ"):
        Scorer.load(model_path, device="cpu", max_seq_length=128, instruction="very long " * 100)


def test_a_prompt_without_room_is_a_start_up_error(tmp_path: Path) -> None:
    static = "".join(map(chr, range(ord("a"), ord("z"))))
    sentence_transformers(template="{{ '" + f"{static} " * 50 + "' }}" + ZERANK_TEMPLATE)(small_model(tmp_path / "m"))
    with pytest.raises(
        ModelLoadError,
        match=r"the prompt with its default instruction leaves no room .* in MAX_SEQ_LENGTH=128: raise it",
    ):
        Scorer.load(tmp_path / "m", device="cpu", max_seq_length=128)


def test_a_device_error_differs_from_other_errors(model_path: Path) -> None:
    scorer = Scorer.load(model_path, device="cpu")
    scorer.model = Flaky(scorer, lambda batch: torch.AcceleratorError("CUDA error: device-side assert"))  # type: ignore[assignment]
    with pytest.raises(DeviceLostError):
        scorer.rerank("a", ["b"])
    scorer.model = Flaky(scorer, lambda batch: RuntimeError("shapes do not match"))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="shapes"):
        scorer.rerank("a", ["b"])


def test_a_score_that_is_not_a_number_is_an_error(model_path: Path) -> None:
    scorer = Scorer.load(model_path, device="cpu")
    scorer.score = lambda batch: [0.0, float("nan")]  # type: ignore[method-assign]
    with pytest.raises(ScoringError, match="not a number"):
        scorer.rerank("a", ["b", "c"])


def test_a_precision_without_finite_scores_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The weights overflow float16 (largest number 65,504), and no other precision."""
    path = make_model(tmp_path / "m", std=100.0)
    with caplog.at_level(logging.INFO):
        scorer = Scorer.load(path, device="cpu", precision="float16")
    assert scorer.info.precision == "float32"
    assert "precision float16 cannot be used: a warm-up score is not a number" in caplog.text
    assert "precision: float32 (float16 failed)" in caplog.text


def test_the_choices_are_logged_with_their_reasons(model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        scorer = Scorer.load(model_path, device="cpu", batch_size=3)
    for part in ("device: cpu (requested)", "attention: ", "precision: ", "token budget: "):
        assert part in caplog.text
    assert scorer.max_batch_documents == 3
    assert scorer.max_batch_tokens >= 1024
    assert Scorer.load(model_path, device="cpu", max_batch_tokens=300).max_batch_tokens == 300


def test_encoding_runs_beside_scoring(scorer: Scorer) -> None:
    group = requests(random.Random(17), 8)
    encoded = [scorer.encode(r) for r in group]
    reference = [scorer.score(scorer.pack([Slice(e, 0, len(e.documents))])) for e in encoded]
    seen: list[bool] = []
    threads = [
        threading.Thread(target=lambda: seen.extend(scorer.encode(r) == e for r, e in zip(group, encoded, strict=True)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    actual = [scorer.score(scorer.pack([Slice(e, 0, len(e.documents))])) for e in encoded]
    for thread in threads:
        thread.join()
    assert worst(actual, reference) == 0
    assert seen == [True] * 24


def test_the_demo_is_recognised(scorer: Scorer) -> None:
    for demo in (Scorer.load(device="cpu"), Scorer.load(str(DEMO), device="cpu")):
        assert (demo.info.name, demo.info.demo) == ("demo", True)
    assert not scorer.info.demo


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.6), ("float16", 0.08)])
def test_cuda_equals_the_card(model_path: Path, card: Card, precision: str, tolerance: float) -> None:
    scorer = Scorer.load(model_path, device="cuda", precision=precision)
    rng = random.Random(18)
    for _ in range(15):
        group = requests(rng, rng.randrange(1, 6))
        assert worst(packed(scorer, group), [expected(card, r) for r in group]) < tolerance


@pytest.mark.cuda
@CUDA
def test_cuda_runs_out_of_memory_and_recovers(model_path: Path) -> None:
    """In float32 nothing is recorded, so every pass allocates; 64 MiB of free memory are less than this one needs."""
    scorer = Scorer.load(model_path, device="cuda", precision="float32", max_batch_tokens=4_000_000)
    request = RerankRequest("what?", ["some words of a document " * 20] * 2000)
    expected_logits = scorer.rerank("what?", request.documents[:1])
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
    try:
        actual = scorer.rerank("what?", request.documents)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert actual == pytest.approx(expected_logits * 2000, abs=1e-3)
    assert scorer.max_batch_tokens < 4_000_000


def test_a_folder_loaded_twice_gives_the_same_scores(model_path: Path) -> None:
    """Weights that do not come from the files would differ between workers."""
    query, documents = "how to compress files", ["gzip compresses files", "a game of chess", "压缩"]
    first, second = (Scorer.load(model_path, device="cpu", precision="float32") for _ in range(2))
    assert first.rerank(query, documents) == second.rerank(query, documents)


@pytest.mark.parametrize("rope", ["default", "linear", "yarn", "llama3"])
def test_a_document_scores_alone_as_beside_others(tmp_path: Path, rope: str) -> None:
    """Some rotary embeddings choose their frequencies by the longest sequence; these do not."""
    parameters = {
        "rope_type": rope,
        "rope_theta": 1e6,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    known = {"default": 2, "linear": 3, "yarn": 3, "llama3": 6}[rope]
    path = make_model(
        tmp_path / "m", std=0.03, max_position_embeddings=128, rope_parameters=dict([*parameters.items()][:known])
    )
    scorer = Scorer.load(path, device="cpu", precision="float32")
    rng = random.Random(5)
    documents = [text(rng, most) + "." for most in (2, 20, 400, 900)]
    [together] = packed(scorer, [RerankRequest("a query", documents)])
    alone = [packed(scorer, [RerankRequest("a query", [document])])[0][0] for document in documents]
    assert together == pytest.approx(alone, abs=1e-4)


def test_the_library_refuses_arguments_of_other_types_and_reports_truncation(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = Scorer.load(model_path, device="cpu", max_seq_length=200)
    documents: Any
    for documents in ("abc", [None], ["a", 3], [{"text": "a"}]):
        with pytest.raises(InvalidRequestError, match="documents: must be a list of strings"):
            scorer.rerank("q", documents)
    for query in ("", " ", None):
        with pytest.raises(InvalidRequestError, match="query: must be a string that is not empty"):
            scorer.rerank(query, ["a"])  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        scorer.rerank("q", ["short", "word " * 1000])
    assert "1 of 2 documents did not fit and were truncated" in caplog.text
