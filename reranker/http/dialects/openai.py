"""GET /v1/models and /v1/models/{name}: what OpenAI's clients, and user interfaces built on them, ask for.

xinference-client asks for the model by name before it sends anything, and reads `model_type`.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from reranker.http.errors import ErrorBody

router = APIRouter(tags=["models"])


class ServedModel(BaseModel):
    """A model that may be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    model_type: Literal["rerank"]


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"]
    data: list[ServedModel]


_NOT_LOADED: dict[int | str, dict[str, object]] = {503: {"model": ErrorBody, "description": "The model is not loaded"}}


def _served(request: Request) -> dict[str, object]:
    name = request.app.state.batcher.require_ready().info.name
    # When a checkpoint was made is not known; the field is required of the answer.
    return {"id": name, "object": "model", "created": 0, "owned_by": "reranker", "model_type": "rerank"}


@router.get(
    "/v1/models", summary="The served model, as OpenAI lists it", response_model=ModelList, responses=_NOT_LOADED
)
async def models(request: Request) -> Response:
    """A list of one model."""
    return JSONResponse({"object": "list", "data": [_served(request)]})


@router.get(
    "/v1/models/{name:path}",
    summary="The served model, whatever name it is asked for by",
    response_model=ServedModel,
    # Else FastAPI describes a 422 for the name, which any text fits.
    responses={**_NOT_LOADED, "4XX": {"model": ErrorBody, "description": "Not served"}},
)
async def model(request: Request, name: str) -> Response:
    """The same for every name, as a rerank takes every `model`."""
    return JSONResponse(_served(request))
