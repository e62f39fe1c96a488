"""The OpenAPI document against the running service: schemathesis generates valid and invalid requests from it.

All of its checks, over every route that the application has: the pages and the document itself are not in the document,
so they are added here. Of routes that differ in their path alone, one is tested.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts

from app import app
from reranker.http.auth import OPEN
from reranker.request.fields import DOCUMENT
from tests.conftest import FAKE, Server, Start
from tests.http.test_rerank import ALIASES

# Deterministic: the same requests in every run. With 15 examples an operation they are about 1,700.
OPTIONS = "--phases=examples,coverage,fuzzing --generation-deterministic --no-shrink --no-color --checks=all"
PAGES = {"/": "text/html", "/docs": "text/html", "/openapi.json": "application/json"}
METHODS = ("get", "post")
SAME = {*ALIASES, "/v2/rerank", "/api/v2/rerank", "/v1/score"}
"""The handlers, the fields and the responses are those of /rerank and /score."""


def simplify(schema: Any) -> None:
    """Tighten a schema where JSON Schema cannot express a rule.

    Object documents have the fields that rank_fields names, so none are made beside it. There are one or as many
    queries as documents, so one is made.
    """
    if isinstance(schema, list):
        for part in schema:
            simplify(part)
    if not isinstance(schema, dict):
        return
    for part in schema.values():
        simplify(part)
    if "rank_fields" in json.dumps(schema.get("if")):
        schema["then"] = of_strings(schema["else"])
    for name in ("queries", "text_1", "data_1"):
        if name in schema.get("properties", ()):
            schema["properties"][name]["anyOf"][1]["maxItems"] = 1


def of_strings(schema: Any) -> Any:
    """Return a schema with strings for documents."""
    if schema == DOCUMENT:
        return {"type": "string"}
    if isinstance(schema, list):
        return list(map(of_strings, schema))
    return {name: of_strings(part) for name, part in schema.items()} if isinstance(schema, dict) else schema


def described(server: Server) -> dict[str, Any]:
    """The service's own document, and the routes that are not in it."""
    document: dict[str, Any] = server.client.get("/openapi.json").json()
    for path, kind in PAGES.items():
        content = {kind: {"schema": {"type": "object" if kind.endswith("json") else "string"}}}
        document["paths"][path] = {"get": {"responses": {"200": {"description": "A page", "content": content}}}}
    for path in document["paths"]:
        for content in document["paths"][path].get("post", {}).get("requestBody", {}).get("content", {}).values():
            simplify(content["schema"])
    return document


def run(document: dict[str, Any], server: Server, folder: Path, *options: str) -> str:
    """Return the report of schemathesis; any finding fails the test."""
    document["paths"] = {path: item for path, item in document["paths"].items() if path not in SAME}
    (folder / "openapi.json").write_text(json.dumps(document))
    command = [str(Path(sys.executable).with_name("st")), "run", "openapi.json", "--url", str(server.client.base_url)]
    done = subprocess.run(
        [*command, *OPTIONS.split(), *options], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.log[-6000:]
    operations = sum(method in METHODS for path in document["paths"].values() for method in path)
    assert f"Tested: {operations}\n" in done.stdout
    assert "Traceback" not in server.log
    return done.stdout


def test_routes_that_are_not_tested_are_described_as_those_that_are(fake_server: Server) -> None:
    paths = fake_server.client.get("/openapi.json").json()["paths"]
    for path in SAME:
        same = paths["/score" if path == "/v1/score" else "/rerank"]["post"]
        assert paths[path]["post"] | {name: same[name] for name in ("summary", "operationId")} == same


def test_summaries_are_plain_text(fake_server: Server) -> None:
    """Swagger UI shows them as they are, while descriptions are Markdown."""
    document = fake_server.client.get("/openapi.json").json()
    assert not [o["summary"] for path in document["paths"].values() for o in path.values() if "`" in o["summary"]]


def test_no_route_is_left_out(fake_server: Server) -> None:
    assert {str(context.path).replace("{name:path}", "{name}") for context in iter_route_contexts(app.routes)} == set(
        described(fake_server)["paths"]
    )


@pytest.mark.parametrize("examples", [5, pytest.param(15, marks=pytest.mark.slow)])
def test_the_service_does_what_its_openapi_document_says(fake_server: Server, tmp_path: Path, examples: int) -> None:
    """No 500, only documented statuses, content types and bodies; forbidden requests are refused."""
    run(described(fake_server), fake_server, tmp_path, f"--max-examples={examples}")


@pytest.mark.slow
def test_with_a_token_as_well_and_never_without_it(start: Start, tmp_path: Path) -> None:
    server = start(command=FAKE, ACCESS_TOKEN="t0k3n", token="t0k3n", LOG_LEVEL="DEBUG")
    document = described(server)
    for path in PAGES.keys() - OPEN:  # the service's document describes them no more than without tokens
        [operation] = document["paths"][path].values()
        operation["responses"]["401"] = document["paths"]["/health"]["get"]["responses"]["401"]
        operation["security"] = document["paths"]["/health"]["get"]["security"]
    header = ["--header", "Authorization: Bearer t0k3n"]
    run(document, server, tmp_path, "--max-examples=5", *header)
    assert "t0k3n" not in server.log
