"""The files of GitHub, pre-commit and CITATION.cff: valid by their schemas, and with no more rights than they need."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from check_jsonschema import main as check_jsonschema
from click.testing import CliRunner
from pre_commit.commands.validate_config import validate_config

from tests.conftest import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").iterdir())
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS[1:],  # a job that calls another workflow has none
    "vendor.dependabot": [GITHUB / "dependabot.yml"],
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.github-issue-forms": [GITHUB / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "feature.yml")],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


def read(name: str) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load((GITHUB / name).read_text(encoding="utf-8"))
    return content


def jobs() -> dict[str, dict[str, Any]]:
    return {name: job for path in WORKFLOWS for name, job in read(f"workflows/{path.name}")["jobs"].items()}


def check(schema: str, *paths: object) -> tuple[int, str]:
    """The schemas are files of the package: nothing is downloaded."""
    done = CliRunner().invoke(check_jsonschema, ["--builtin-schema", schema, *map(str, paths)])
    return done.exit_code, done.output


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_file_is_valid(schema: str) -> None:
    code, output = check(schema, *SCHEMAS[schema])
    assert code == 0, output


def test_every_file_of_github_is_checked() -> None:
    files = {path for path in GITHUB.rglob("*") if path.suffix in (".yml", ".yaml")}
    assert files == {path for paths in SCHEMAS.values() for path in paths if path.is_relative_to(GITHUB)}


def test_an_invalid_file_is_found(tmp_path: Any) -> None:
    bad = tmp_path / "bad.yml"
    bad.write_text((GITHUB / "workflows" / "ci.yml").read_text(encoding="utf-8").replace("runs-on", "run-on"))
    assert check("vendor.github-workflows", bad)[0] == 1


def test_the_hook_before_a_commit_is_make_check() -> None:
    assert validate_config([str(ROOT / ".pre-commit-config.yaml")]) == 0
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == ["make check"]


def test_ci_is_the_script_that_every_machine_runs() -> None:
    content = read("workflows/ci.yml")
    assert {"push", "pull_request", "workflow_call"} == set(content[True]), "YAML 1.1 reads `on` as true"
    job = content["jobs"]["run"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert job["strategy"]["matrix"]["python"][0] == "3.11", "the oldest that pyproject.toml admits"


def test_a_workflow_has_only_the_rights_it_needs() -> None:
    for path in WORKFLOWS:
        assert read(f"workflows/{path.name}")["permissions"] == {"contents": "read"}
    given = {name: job["permissions"] for name, job in jobs().items() if "permissions" in job}
    assert given == {"pypi": {"id-token": "write"}, "image": {"contents": "read", "packages": "write"}}
    for job in jobs().values():
        for step in job.get("steps", []):
            assert "${{" not in step.get("run", ""), "a name from outside must not become a command"
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}


def test_actions_are_pinned_by_major_version() -> None:
    used = [step["uses"] for job in jobs().values() for step in job.get("steps", []) if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"(actions|docker|pypa)/[a-z-]+@(v\d+|release/v\d+)", action), action


def test_a_release_is_tested_and_has_the_version_of_its_tag() -> None:
    release = jobs()
    assert release["test"]["uses"] == "./.github/workflows/ci.yml"
    assert release["image"]["needs"] == ["test", "build"]
    assert release["pypi"]["needs"] == ["test", "build", "image"], "a release there cannot be taken back"
    [check] = [step["run"] for step in release["build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", "")]
    assert "reranker.__version__" in check
    variants = {row["suffix"]: row["torch_index"] for row in release["image"]["strategy"]["matrix"]["include"]}
    assert variants == {"": "", "-cpu": "https://download.pytorch.org/whl/cpu"}


def test_dependabot_looks_where_the_pins_are() -> None:
    updates = {update["package-ecosystem"]: update for update in read("dependabot.yml")["updates"]}
    assert set(updates) == {"pip", "docker", "docker-compose", "github-actions"}
    for ecosystem, pattern in (("pip", "requirements*.txt"), ("docker", "*Dockerfile")):
        for folder in updates[ecosystem]["directories"]:
            assert any((ROOT / folder.strip("/")).glob(pattern)), folder


def test_a_bug_report_asks_for_what_an_operator_needs_and_for_no_secret() -> None:
    form = read("ISSUE_TEMPLATE/bug.yml")
    required = {field.get("id") for field in form["body"] if field.get("validations", {}).get("required")}
    assert {"version", "run", "info", "log"} <= required
    text = (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    assert "no token and no text" in text
    assert "SECURITY.md" in text
    for name in re.findall(r"docs/\w+\.md|SECURITY\.md", text):
        assert (ROOT / name).is_file(), name
