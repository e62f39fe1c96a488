"""GET /info of text-embeddings-inference (TEI). Its rerank response is the native array.

Dify's TEI plugin reads /info before it saves a model: it requires status 200 and "reranker" as the first key of
`model_type`, and adopts `max_input_length` and `max_client_batch_size`.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel

from reranker import __version__
from reranker.http.errors import NOT_LOADED
from reranker.http.state import service_of

router = APIRouter(tags=["models"])

REQUEST = {"query": "what is a cat?", "texts": ["a bread", "a small animal"]}
"""Example of a rerank request for the OpenAPI document."""


class Labels(BaseModel):
    """The classes of the model: one, whose score is returned."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(BaseModel):
    """The task of the model."""

    reranker: Labels


class Info(BaseModel):
    """The served model and the limits of a request, in the format of text-embeddings-inference."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: ModelType
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    device: str
    demo: bool
    """Whether it is the bundled demo model, which is for trying the API only."""
    self_check: str
    """`passed`, `failed` or `not run`, with the languages whose obvious texts decided, or the reason."""
    family: str
    """The architecture that is computed, such as Qwen3."""
    score: str
    """The logit of a document in words, such as `logit(yes) - logit(no)`."""
    prompt: str
    """Where the prompt is written down: the model card, or the checkpoint's chat template."""
    reads_instruction: bool
    """Whether the prompt has an instruction; without one, `instruction` is reported as not read."""
    adapter: str | None
    """The LoRA adapter that is merged into the weights: folder, rank, base."""
    docker_label: str | None


@router.get("/info", summary="The served model and its limits, as TEI answers them", responses=NOT_LOADED)
async def info(request: Request) -> Info:
    """Read by Dify and other TEI clients before their first rerank request."""
    service = service_of(request.app)
    model = service.batcher.require_ready().info
    return Info(
        model_id=model.name,
        model_sha=None,
        model_dtype=model.precision,
        model_type=ModelType(reranker=Labels(id2label={"0": "relevant"}, label2id={"relevant": 0})),
        max_concurrent_requests=service.batcher.admission.max_requests,
        max_input_length=model.max_seq_length,
        max_batch_tokens=model.max_batch_tokens,
        max_batch_requests=None,
        max_client_batch_size=service.max_documents,
        auto_truncate=True,
        tokenization_workers=1,
        version=__version__,
        sha=None,
        device=model.device,
        demo=model.demo,
        self_check=model.self_check,
        family=model.family,
        score=model.score,
        prompt=model.prompt,
        reads_instruction=model.reads_instruction,
        adapter=model.adapter or None,
        docker_label=None,
    )
