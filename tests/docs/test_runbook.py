"""docs/runbook.md is true: each alert has its row, and the metrics, log lines and settings of each row exist."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from gunicorn import arbiter

from config import Settings
from reranker import errors
from tests.conftest import ROOT
from tests.docs.test_faults import cells
from tests.http.test_monitoring import exported, rules, tool  # noqa: F401

TEXT = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
ROWS = [
    row
    for row in TEXT.splitlines()
    if row.startswith("| ") and cells(row)[-1] not in ("what to do", "alone") and "gunicorn |" not in row
]
CODE = [ROOT / "app.py", ROOT / "config.py", ROOT / "gunicorn.conf.py", *(ROOT / "reranker").rglob("*.py")]
INSIDE_CODE = re.findall(r"`([^`]+)`", TEXT)


def strings(path: Path) -> list[str]:
    """Return every text in a module; adjacent ones are one text."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_every_alert_names_its_row() -> None:
    anchors = re.findall(r'<a id="(\w+)"></a>', TEXT)
    assert len(anchors) == len(set(anchors))
    assert {f"docs/runbook.md#{anchor}" for anchor in anchors} == {r["annotations"]["runbook"] for r in rules()}
    for rule in rules():
        [row] = [row for row in ROWS if f'id="{rule["alert"].lower()}"' in row]
        assert f"`{rule['alert']}`" in cells(row)[0]
        assert rule["annotations"]["runbook"].endswith(f"#{rule['alert'].lower()}")


def test_the_commands_that_make_links_are_true(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    commands = [line.removeprefix("    ") for line in TEXT.splitlines() if line.startswith("    ")]
    for command in commands:
        line = command.replace(".venv/bin/python", sys.executable)
        subprocess.run(line, shell=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, check=True)
    for path in ("prometheus/alerts.yml", "kubernetes/alerts.yaml"):
        value = yaml.safe_load((tmp_path / "deploy" / path).read_text(encoding="utf-8"))
        found = [rule["annotations"] for group in value.get("spec", value)["groups"] for rule in group["rules"]]
        assert len(found) == len(rules())
        for notes in found:
            assert re.fullmatch(r"https://wiki\.example/reranker/docs/runbook\.md#reranker\w+", notes["runbook_url"])
            assert "runbook" not in notes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: re.sub(r"<.*?>", "", cells(row)[0])[:40])
def test_every_row_says_what_one_sees_where_to_look_and_what_to_do(row: str) -> None:
    assert len(ROWS) > 25
    if cells(row)[0] not in ("log", "state", "restart"):
        assert [bool(cell) for cell in cells(row)] == [True] * 3


def test_log_lines_exist() -> None:
    texts = [text for path in [*CODE, Path(arbiter.__file__)] for text in strings(path)]
    quoted = [part.strip('"') for part in INSIDE_CODE if part.startswith('"')]
    assert len(quoted) > 20
    assert not [text for text in quoted if not any(text in known for known in texts)]


def test_metrics_exist(exported: dict[str, set[str]]) -> None:  # noqa: F811
    used = set(re.findall(r"reranker_\w+", TEXT))
    assert len(used) > 10
    assert used <= set(exported)


def test_promtool_accepts_the_queries(tmp_path: Path) -> None:
    queries = [part for part in INSIDE_CODE if re.match(r"(\w+ by .*|increase)\(|reranker_\w+ / ", part)]
    assert len(queries) >= 3
    found = [{"record": f"runbook:{i}", "expr": query} for i, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "runbook", "rules": found}]}))
    command = [tool("promtool"), "check", "rules", str(tmp_path / "rules.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_settings_and_kinds_of_errors_exist() -> None:
    names = {name for part in INSIDE_CODE for name in re.findall(r"\b[A-Z][A-Z]+_[A-Z_]+\b|^[A-Z]{4,}\b", part)}
    assert len(names) > 20
    settings = {name.upper() for name in Settings.model_fields}
    others = " ".join(
        path.read_text(encoding="utf-8") for path in [*CODE, *(ROOT / "deploy").rglob("*.yaml"), ROOT / ".env.example"]
    )
    assert not [name for name in names - settings if not re.search(rf"\b{name}\b", others)]
    kinds = {kind.error_type for kind in vars(errors).values() if hasattr(kind, "error_type")} | {"cors_refused"}
    used = set(re.findall(r"error_type=(\w+)", TEXT))
    assert len(used) > 3
    assert used <= kinds


def test_fields_of_a_log_line_exist() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "reranker" / "http").glob("*.py"))
    fields = {part[:-1] for part in INSIDE_CODE if re.fullmatch(r"[a-z_]+=", part)}
    assert {"detail", "client_address", "trace_id", "queue_ms"} <= fields
    assert not [field for field in fields - {"id"} if f'"{field}"' not in source]
