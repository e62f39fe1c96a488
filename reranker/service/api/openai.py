"""GET /v1/models: the list that OpenAI's clients, and user interfaces built on them, ask for."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from reranker.service.api.errors import ErrorBody

router = APIRouter(tags=["models"])


class ServedModel(BaseModel):
    """A model that may be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"]
    data: list[ServedModel]


@router.get(
    "/v1/models",
    summary="The served model, as OpenAI lists it",
    response_model=ModelList,
    responses={503: {"model": ErrorBody, "description": "The model is not loaded"}},
)
async def models(request: Request) -> Response:
    """A list of one model."""
    name = request.app.state.batcher.check_ready().info.name
    # When a checkpoint was made is not known; the field is required of the answer.
    model = {"id": name, "object": "model", "created": 0, "owned_by": "reranker"}
    return JSONResponse({"object": "list", "data": [model]})
