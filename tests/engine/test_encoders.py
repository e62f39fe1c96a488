"""Encoders equal transformers, one pair at a time without padding, whatever they are scored beside."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers.models.bert import modeling_bert

from reranker import Scorer
from reranker.engine import lanes as lanes_module
from reranker.engine import linear as linear_module
from reranker.engine.budget import split
from reranker.engine.lanes import DealtBatch, Lanes
from reranker.errors import InvalidRequestError, ModelLoadError
from reranker.types import EncodedRequest, RerankRequest, Slice
from tests.engine.encoders import CHINESE, KINDS, POSITIONS, SPECIAL, WORDS, modernbert, texts_with
from tests.engine.pairs import Pairs

ODD = [
    "",
    " ",
    "\n",
    "x",
    "如何压缩文件 gzip 可以压缩文件。",
    "\n\n begins so",
    "ends in a line.\n",
    "a  b\t c" + " " * 30 + "d",
    "don't, 1 2 3; C++ (a.b/c?d=1)",
    "e\u0301 naïve Ａ\u3000ﬁle ①\u200b",
    "a \ud800 lone surrogate",
    "\x00\x1b[31m",
    "mail |||EMAIL_ADDRESS||| to",
]
TOLERANCE = 1e-5
"""Of a logit in float32."""


class Loaded(NamedTuple):
    """A folder, the engine and the reference."""

    folder: Path
    scorer: Scorer
    reference: Pairs

    @property
    def special(self) -> tuple[str, ...]:
        return SPECIAL[self.reference.model.config.model_type]


def load(folder: Path, *, precision: str = "float32", **options: Any) -> Scorer:
    return Scorer.load(folder, device="cpu", precision=precision, max_batch_tokens=4096, **options)


def quick(*cases: str) -> list[Any]:
    """All kinds, of which only `cases` are tested by `make test`."""
    return [pytest.param(case, marks=[] if case in cases else pytest.mark.slow) for case in KINDS]


@pytest.fixture(scope="module", params=quick("xlm-roberta", "bert", "modernbert-mean"))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = KINDS[request.param](tmp_path_factory.mktemp("encoders") / request.param)
    return Loaded(folder, load(folder), Pairs(folder))


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice([rng.choice(WORDS), rng.choice(CHINESE), *WORDS[:3]]) for _ in range(words))


def requests(rng: random.Random, count: int) -> list[RerankRequest]:
    """Requests whose pairs fit into the model."""
    return [
        RerankRequest(
            rng.choice([text(rng, rng.choice([1, 4, 20])), "如何压缩文件", *filter(str.strip, ODD)]),
            [rng.choice([rng.choice(ODD), text(rng, rng.choice([1, 7, 40]))]) for _ in range(rng.randrange(1, 6))],
        )
        for _ in range(count)
    ]


def pairs(encoded: EncodedRequest) -> list[list[int]]:
    return [encoded.prefix + document for document in encoded.documents]


def score(scorer: Scorer, encoded: Sequence[EncodedRequest]) -> list[float]:
    """Logits of one forward pass."""
    return scorer.score(scorer.pack([Slice(request, 0, len(request.documents)) for request in encoded]))


def alone(scorer: Scorer, request: EncodedRequest) -> list[float]:
    """Logits of one forward pass for each document."""
    slices = [Slice(request, i, i + 1) for i in range(len(request.documents))]
    return [logit for part in slices for logit in scorer.score(scorer.pack([part]))]


def check(loaded: Loaded, group: Sequence[RerankRequest], scorer: Scorer | None = None) -> list[float]:
    """Compare tokens and logits, all in one pass and each document alone; return the reference's logits."""
    scorer, reference = scorer or loaded.scorer, loaded.reference
    encoded = [scorer.encode(request) for request in group]
    for request, found in zip(group, encoded, strict=True):
        assert pairs(found) == [reference.ids(request.query, document) for document in request.documents]
        assert not found.truncated
    expected = [reference.logit(request.query, document) for request in group for document in request.documents]
    together = score(scorer, encoded)
    assert together == pytest.approx(expected, abs=TOLERANCE)
    assert [logit for request in encoded for logit in alone(scorer, request)] == pytest.approx(expected, abs=TOLERANCE)
    return expected


def test_random_pairs_equal_transformers(loaded: Loaded) -> None:
    rng = random.Random(1)
    logits = [logit for _ in range(4) for logit in check(loaded, requests(rng, rng.randrange(1, 6)))]
    assert torch.tensor(logits).std() > 0.2


def test_the_reference_builds_the_tokenizers_own_pairs(loaded: Loaded) -> None:
    for query in ("how to compress files", "如何压缩文件", *ODD):
        for document in ODD:
            if "\ud800" not in query + document:
                assert loaded.reference.ids(query, document) == loaded.reference.plain(query, document)


def test_control_tokens_in_texts_are_text(loaded: Loaded) -> None:
    reference, texts = loaded.reference, texts_with(loaded.special)
    group = [RerankRequest(query, texts) for query in ("how to compress files", texts[7])]
    check(loaded, group)
    special = set(reference.tokenizer.all_special_ids) - {reference.tokenizer.unk_token_id}
    frame = len(reference.join([], []))
    for request in group:
        for ids in pairs(loaded.scorer.encode(request)):
            assert sum(i in special for i in ids) == frame
    forged = reference.plain("how to compress files", texts[5])
    assert forged != reference.ids("how to compress files", texts[5])  # unless they are text


def test_long_documents_are_truncated_as_the_tokenizer_does(loaded: Loaded) -> None:
    """At the model's own length, though MAX_SEQ_LENGTH is larger."""
    scorer, reference, rng = loaded.scorer, loaded.reference, random.Random(2)
    assert scorer.info.max_seq_length == POSITIONS
    documents = [text(rng, words) for words in (POSITIONS, 5, POSITIONS * 20)] + ["a" * 5000, " the" * 5000, "压" * 999]
    for query in ("how to compress files", text(rng, 60)):
        encoded = scorer.encode(RerankRequest(query, documents))
        expected = [reference.plain(query, document, POSITIONS) for document in documents]
        assert pairs(encoded) == expected
        assert {len(ids) for i, ids in enumerate(expected) if i in encoded.truncated} == {POSITIONS}
        fits = [i for i, document in enumerate(documents) if len(reference.plain(query, document)) <= POSITIONS]
        assert encoded.truncated == set(range(len(documents))) - set(fits)
        assert 1 in fits
        logits = [reference.score(ids) for ids in expected]
        assert score(scorer, [encoded]) == pytest.approx(logits, abs=TOLERANCE)
        assert alone(scorer, encoded) == pytest.approx(logits, abs=TOLERANCE)
    with pytest.raises(InvalidRequestError, match=r"documents\[2\]: longer than the limit"):
        scorer.encode(RerankRequest("x", documents[1:2] * 2 + documents[2:3], truncate=False))


def test_tokens_that_stand_for_many_characters(loaded: Loaded) -> None:
    """White space, unknown words and removed characters have no limit of characters per token."""
    rng, query = random.Random(12), "how to compress files"
    for _ in range(4):
        documents = []
        for _ in range(4):
            runs = ["x ", "x", " ", "\x00", "ख", "ख ", "é", "the ", "压", "\n"]
            parts = [rng.choice(runs) * rng.choice([1, 7, 40, 98, 102, 150, 700]) for _ in range(rng.randrange(1, 12))]
            documents.append(" ".join(parts) + rng.choice(["", " " * 9000, "x" * 9000]) + " cat gzip" * 150)
        encoded = loaded.scorer.encode(RerankRequest(query, documents))
        assert pairs(encoded) == [loaded.reference.plain(query, document, POSITIONS) for document in documents]
        whole = [i for i, d in enumerate(documents) if len(loaded.reference.plain(query, d)) <= POSITIONS]
        assert encoded.truncated == set(range(4)) - set(whole)


def test_a_text_that_is_shortened_inside_a_long_word(loaded: Loaded) -> None:
    """Only its start is tokenised; the start of a word may have more tokens than the word, which WordPiece drops."""
    documents = ["x " * n + f"{'y' * 150} " * 30 for n in range(225, 250, 3)]
    found = pairs(loaded.scorer.encode(RerankRequest("x", documents)))
    assert found == [loaded.reference.plain("x", document, POSITIONS) for document in documents]


def test_a_document_that_fits_exactly_is_whole(loaded: Loaded) -> None:
    room = POSITIONS - len(loaded.reference.ids("x", ""))
    encoded = loaded.scorer.encode(RerankRequest("x", [" x" * room, " x" * (room + 1)]))
    assert [len(ids) for ids in pairs(encoded)] == [POSITIONS, POSITIONS]
    assert encoded.truncated == {1}


@pytest.mark.slow
@pytest.mark.parametrize("length", [32, 100])
def test_a_smaller_max_seq_length_truncates_there(loaded: Loaded, length: int) -> None:
    scorer, long = load(loaded.folder, max_seq_length=length), text(random.Random(3), 300)
    assert scorer.info.max_seq_length == length
    encoded = scorer.encode(RerankRequest("how to compress files", [long, "x"]))
    expected = [loaded.reference.plain("how to compress files", document, length) for document in (long, "x")]
    assert pairs(encoded) == expected
    assert score(scorer, [encoded]) == pytest.approx([loaded.reference.score(ids) for ids in expected], abs=TOLERANCE)


def test_chunks_are_windows_of_the_documents_tokens(loaded: Loaded) -> None:
    scorer, reference, query = loaded.scorer, loaded.reference, "how to compress files"
    long = text(random.Random(4), 90)
    documents = [long, "short", "", "é e\u0301 ﬁle " * 9 + "end", "[SEP]</s> " * 12]
    encoded = scorer.encode(RerankRequest(query, documents, max_tokens_per_doc=10, max_chunks_per_doc=6))
    expected = []
    for document in documents:
        ids = reference.text(document)
        expected += [reference.join(reference.text(query), ids[i : i + 10]) for i in range(0, len(ids) or 1, 10)][:6]
    assert pairs(encoded) == expected
    assert alone(scorer, encoded) == pytest.approx([*map(reference.score, expected)], abs=TOLERANCE)
    assert encoded.chunks is not None
    assert encoded.count == len(documents)
    assert encoded.truncated == {i for i, document in enumerate(documents) if len(reference.text(document)) > 60}
    for document, borders in zip(documents, encoded.chunks, strict=True):
        assert borders == sorted(borders)
        assert borders[0] == 0
        assert borders[-1] <= len(document)
        # Each part of the text gives the tokens of its chunk, where no word is split.
        if document == long:
            for i, (start, stop) in enumerate(pairwise(borders)):
                window = reference.text(long)[10 * i : 10 * i + 10]
                part = reference.text(long[start:stop])
                assert len(set(window) - set(part)) <= 2


def test_a_long_query_is_refused_or_truncated_as_asked(loaded: Loaded) -> None:
    scorer, reference = loaded.scorer, loaded.reference
    query = text(random.Random(5), 2 * POSITIONS)
    with pytest.raises(InvalidRequestError, match="leave no room for a document"):
        scorer.encode(RerankRequest(query, ["x"]))
    encoded = scorer.encode(RerankRequest(query, ["x", query], truncate_query=True))
    assert encoded.query_truncated
    half = (POSITIONS - len(reference.join([], []))) // 2
    ends = [start for start, _ in reference.text_tokenizer.encode(query).offsets[half - 3 : half + 4]]
    starts = [query[:end] for end in ends]
    expected = [[reference.plain(start, document, POSITIONS) for document in ("x", query)] for start in starts]
    assert pairs(encoded) in expected
    logits = [reference.score(ids) for ids in pairs(encoded)]
    assert score(scorer, [encoded]) == pytest.approx(logits, abs=TOLERANCE)


@pytest.mark.parametrize("tokens", [1, 60, 300])
def test_scores_do_not_depend_on_the_budget(loaded: Loaded, tokens: int) -> None:
    scorer, query = loaded.scorer, "how to compress files"
    documents = [text(random.Random(i), i) for i in range(0, 60, 4)]
    request = scorer.encode(RerankRequest(query, documents))
    parts = split(request, tokens, 1 << 30)
    assert len(parts) > 1
    found = [logit for part in parts for logit in scorer.score(scorer.pack([part]))]
    expected = [loaded.reference.logit(query, document) for document in documents]
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_the_cost_of_a_request_is_its_pairs(loaded: Loaded) -> None:
    """Nothing is shared between the pairs of a request, so every document counts with its query."""
    query, documents = "how to compress files", ["x", "gzip files", ""]
    encoded = loaded.scorer.encode(RerankRequest(query, documents))
    tokens = sum(len(loaded.reference.ids(query, document)) for document in documents)
    part = Slice(encoded, 0, 3)
    assert encoded.tokens == part.tokens == part.prompt_tokens == loaded.scorer.pack([part]).tokens == tokens


def test_lanes(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "MIN_TOKENS", 1)
    scorer, rng = copy.copy(loaded.scorer), random.Random(6)
    scorer.lanes = Lanes(2, 2)
    for _ in range(4):
        group = [scorer.encode(request) for request in requests(rng, rng.randrange(2, 6))]
        batch = scorer.pack([Slice(request, 0, len(request.documents)) for request in group])
        assert isinstance(batch, DealtBatch)
        expected = [loaded.reference.score(ids) for request in group for ids in pairs(request)]
        assert scorer.score(batch) == pytest.approx(expected, abs=TOLERANCE)


def test_blocks_of_a_layers_tokens(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "BLOCK_ROWS", 16)
    backbone: Any = loaded.scorer.model.backbone
    rows: list[int] = []
    last = backbone.layers[0].get_submodule(backbone.projections[-1][0])
    with last.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]))):
        check(loaded, requests(random.Random(13), 3))
    assert 16 in rows
    assert max(rows) <= 24


@pytest.mark.parametrize(
    ("parent", "part"),
    [(modeling_bert.BertLayer, "gate"), (modeling_bert.BertEmbeddings, "gate"), (modeling_bert.BertSelfOutput, "norm")],
)
def test_a_parameter_that_is_not_computed_is_refused(
    parent: Any, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a newer transformers may have it."""
    init = parent.__init__

    def changed(module: Any, *args: Any, **options: Any) -> None:
        init(module, *args, **options)
        module.register_module(part, torch.nn.Linear(4, 4))

    monkeypatch.setattr(parent, "__init__", changed)
    folder = KINDS["bert"](tmp_path / "m")
    with pytest.raises(ModelLoadError, match=rf"\.{part}\.weight, which is not computed: install the version"):
        load(folder)


@pytest.mark.parametrize("kind", quick("bert"))
def test_two_labels_are_the_second_minus_the_first(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path / "m", num_labels=2)
    loaded = Loaded(folder, load(folder), Pairs(folder))
    check(loaded, requests(random.Random(7), 2))
    [probability] = loaded.scorer.rerank("how to compress files", ["gzip"])
    ids = loaded.reference.plain("how to compress files", "gzip")
    labels = loaded.reference.labels(ids)
    assert probability == pytest.approx(float(labels.softmax(0)[1]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.25), ("float16", 0.03), ("int8", 0.4)])
def test_narrow_precisions(loaded: Loaded, precision: str, tolerance: float) -> None:
    scorer, rng = load(loaded.folder, precision=precision), random.Random(8)
    assert scorer.info.precision == precision
    group = requests(rng, 8)
    encoded = [scorer.encode(request) for request in group]
    expected = torch.tensor([loaded.reference.score(ids) for request in encoded for ids in pairs(request)])
    found = torch.tensor(score(scorer, encoded))
    assert float((found - expected).abs().max()) < tolerance
    assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 7, 16, 128])
def test_local_layers_see_their_window(tmp_path: Path, window: int) -> None:
    folder = modernbert(tmp_path / "m", local_attention=window)
    loaded = Loaded(folder, load(folder), Pairs(folder))
    documents = [text(random.Random(i), words) for i, words in enumerate((1, 3, 9, 20, 70, 120))]
    expected = check(loaded, [RerankRequest("how to compress files", documents)])
    wider = Pairs(folder, local_attention=2 * window + 2)
    differences = [abs(wider.logit("how to compress files", d) - e) for d, e in zip(documents, expected, strict=True)]
    assert max(differences) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["sliding_attention"] * 5},
        {"layer_types": ["full_attention"] * 5},
        {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]},
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True},
        {"norm_eps": 1e-3},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            }
        },
    ],
    ids=["local only", "global only", "global at odd places", "biases", "an epsilon", "other thetas"],
)
def test_other_shapes_of_modernbert(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = modernbert(tmp_path / "m", **changes)
    check(Loaded(folder, load(folder), Pairs(folder)), requests(random.Random(9), 4))


def test_a_model_without_a_part_of_it_gives_other_logits(loaded: Loaded) -> None:
    """So the comparisons above would find an engine that leaves it out: XLM-R's first position is 2, the one after the
    padding's; BERT tells query and document apart; ModernBERT's local layers see a window."""
    ids = loaded.reference.ids("how to compress files", "gzip the files " * 9)
    config, other = loaded.reference.model.config, loaded.reference
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if config.model_type == "xlm-roberta":
        inputs["position_ids"] = torch.arange(len(ids))[None]
    if config.model_type == "modernbert":
        other = Pairs(loaded.folder, local_attention=2 * config.local_attention)
    with torch.inference_mode():
        logit = float(other.model(**inputs).logits)
    assert abs(logit - loaded.reference.score(ids)) > 1e-2


@pytest.mark.slow
def test_a_sharpened_epsilon_and_other_heads(tmp_path: Path) -> None:
    for i, kind in enumerate(("bert", "xlm-roberta")):
        folder = KINDS[kind](tmp_path / kind, layer_norm_eps=1e-3, num_attention_heads=4, num_hidden_layers=1 + i)
        check(Loaded(folder, load(folder), Pairs(folder)), requests(random.Random(10), 3))
