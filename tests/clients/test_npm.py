"""npm packages, run by Node: the blocks of docs/clients.md that import one, and the scripts of the folder npm.

Each reads `query` and `documents`. Its last line is the ranking: the documents or their indexes, best first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import requests

from conftest import DOCUMENTS, QUERY, ROOT, TOKEN

PACKAGES = Path(os.environ.get("NODE_PACKAGES", ""))
FOLDER = Path(__file__).parent / "npm"
BLOCKS = re.findall(
    r"^```js\n(import .*?)^```", (ROOT / "docs" / "clients.md").read_text(encoding="utf-8"), re.M | re.S
)
SCRIPTS = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.mjs"))]
REPORT = 'process.on("uncaughtException", (error) => { console.log(JSON.stringify(error.message)); process.exit(1); });'

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (PACKAGES / ".ready").exists(),
    reason="needs Node 18 or newer and npm (Debian: nodejs, npm); install them, then run make test-clients",
)


def imports(code: str) -> list[str]:
    return re.findall(r'^import .* from "(.+)";$', code, re.M)


def run(url: str, code: str, query: str = QUERY, token: str = TOKEN) -> tuple[int, Any]:
    """The exit status, and the ranking (0) or the message of the error that the package raised (1)."""
    lines = code.replace("http://host:6006", url).replace("<token>", token).rstrip().splitlines()
    last = lines.pop().removesuffix(";")
    inputs = f"const query = {json.dumps(query)}, documents = {json.dumps(DOCUMENTS)};"
    script = "\n".join([inputs, REPORT, *lines, f"console.log(JSON.stringify({last}));"])
    node = subprocess.run(
        ["node", "--input-type=module", "-"],
        input=script,
        cwd=PACKAGES,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert node.stdout, node.stderr
    return node.returncode, json.loads(node.stdout.splitlines()[-1])


def post(url: str, query: str = QUERY, token: str = TOKEN) -> requests.Response:
    body = {"query": query, "documents": DOCUMENTS}
    return requests.post(f"{url}/v1/rerank", json=body, headers={"Authorization": f"Bearer {token}"}, timeout=300)


def test_the_lock_file_has_no_address_of_an_index() -> None:
    assert '"resolved"' not in (FOLDER / "package-lock.json").read_text(encoding="utf-8")


def test_every_package_has_a_block() -> None:
    packages = json.loads((FOLDER / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert set(packages) == {name for code in BLOCKS for name in imports(code)}


@needs_node
@pytest.mark.parametrize("code", [*BLOCKS, *SCRIPTS], ids=lambda code: imports(code)[0])
def test_the_ranking(url: str, code: str) -> None:
    order = [row["index"] for row in post(url).json()]
    status, ranking = run(url, code)
    assert status == 0, ranking
    assert ranking in (order, [DOCUMENTS[index] for index in order])


@needs_node
@pytest.mark.parametrize("wrong", [{"token": "wrong"}, {"query": ""}], ids=["token", "query"])
@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: imports(code)[0])
def test_the_message_of_an_error_is_the_reason(url: str, code: str, wrong: dict[str, str]) -> None:
    refusal = post(url, **wrong)
    assert refusal.status_code in (401, 422)
    status, message = run(url, code, **wrong)
    assert status == 1, message
    if "llamaindex" in imports(code):  # it reads neither the status nor the body of an error
        assert message == "results is not iterable"
        return
    if "Body: " in message:  # cohere-ai prints the whole body
        message = json.loads(message.split("Body: ")[1])["detail"]
    assert message.removeprefix(f"{refusal.status_code} ") == refusal.json()["detail"]
