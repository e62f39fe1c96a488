"""The OpenAPI document against the running service: schemathesis makes bodies from it, good and bad."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import Server

# Deterministic: the same requests in every run. About 1,700 of them.
OPTIONS = "--phases=examples,coverage,fuzzing --max-examples=15 --generation-deterministic --no-shrink --no-color"


def test_the_service_does_what_its_openapi_document_says(fake_server: Server, tmp_path: Path) -> None:
    """No 500, only documented statuses, content types and bodies; what the document forbids is refused."""
    url = f"{fake_server.client.base_url}/openapi.json"
    operations = sum(len(path) for path in fake_server.client.get("/openapi.json").json()["paths"].values())
    run = subprocess.run(
        [str(Path(sys.executable).with_name("st")), "run", url, *OPTIONS.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"Tested: {operations}\n" in run.stdout
    assert "Traceback" not in fake_server.log
