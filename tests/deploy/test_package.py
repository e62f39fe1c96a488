"""The package: its metadata, and the command of a wheel in a folder without the checkout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from reranker import __version__
from tests.cli.command import environment
from tests.conftest import ROOT, free_port
from tests.deploy.test_supply import PINS

MODEL = ("how to compress files", "a game of chess", "gzip compresses files")


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """What the build backend reads from pyproject.toml and the files it names."""
    command = [sys.executable, "-m", "hatchling", "metadata"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_metadata_is_whole(metadata: dict[str, Any]) -> None:
    assert (metadata["name"], metadata["version"]) == ("qwen3-reranker-service", __version__)
    assert metadata["license"] == "MIT"
    assert metadata["requires-python"] == ">=3.11"
    assert metadata["scripts"] == {"reranker": "reranker.__main__:run"}
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(metadata["classifiers"])
    assert metadata["readme"]["text"].startswith("# Qwen3 reranker service")
    assert "urls" not in metadata, "none is known"


def test_the_dependencies_are_the_pins(metadata: dict[str, Any]) -> None:
    normal = {name.lower().replace("_", "-"): str(pin) for name, pin in PINS.items()}
    assert sorted(metadata["dependencies"]) == sorted(f"{name}{pin}" for name, pin in normal.items())
    text = (ROOT / "requirements-eval.txt").read_text(encoding="utf-8")
    wanted = re.findall(r"^[a-z]\S*==\S+", text, re.M)
    assert metadata["optional-dependencies"] == {"eval": sorted(wanted)}


def test_the_version_has_one_place() -> None:
    """The others read it: the package, --version, /info, the OpenAPI document, a metric."""
    written = rf"""["']{re.escape(__version__)}["']"""
    paths = [*(ROOT / name for name in ("pyproject.toml", "app.py", "config.py")), *(ROOT / "reranker").rglob("*.py")]
    assert [path.name for path in paths if re.search(written, path.read_text(encoding="utf-8"))] == ["__init__.py"]
    assert (ROOT / "reranker" / "__init__.py").read_text(encoding="utf-8").count(__version__) == 1


def build(source: Path, target: str, folder: Path) -> Path:
    """Build `sdist` or `wheel` of a source tree, with the packages of this environment."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    [built] = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source archive, which therefore has every file of it."""
    folder = tmp_path_factory.mktemp("build")
    archive = build(ROOT, "sdist", folder / "sdist")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return build(folder / archive.name.removesuffix(".tar.gz"), "wheel", folder / "wheel")


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The installed `reranker`, in an environment that reads the dependencies of this one and not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    [site] = folder.glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return str(folder / "bin" / "reranker")


def run(command: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    variables = environment(PYTHONPATH="")
    return subprocess.run([command, *words], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_wheel_has_one_package_with_the_service_and_the_demo_in_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"reranker", "qwen3_reranker_service"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "reranker").rglob("*") if path.is_file()}
    beside = {"app.py", "config.py", "gunicorn.conf.py", *map(str, _demo())}
    packaged = {name for name in names if name.startswith("reranker/")}
    assert packaged == {n for n in sources if "__pycache__" not in n} | {f"reranker/_root/{name}" for name in beside}
    assert "reranker/py.typed" in packaged


def _demo() -> list[Path]:
    return [path.relative_to(ROOT) for path in (ROOT / "models" / "demo").iterdir()]


@pytest.mark.slow
def test_the_commands_of_a_wheel_work_in_an_empty_folder(command: str, tmp_path: Path) -> None:
    assert run(command, "--version", cwd=tmp_path).stdout == f"{__version__}\n"
    best, _ = json.loads(run(command, "rank", *MODEL, cwd=tmp_path).stdout)
    assert best["index"] == 1
    facts = json.loads(run(command, "check", cwd=tmp_path).stdout)
    assert (facts["status"], facts["model"]) == ("ok", "demo")
    refused = run(command, "serve", "--port", "1", cwd=tmp_path)
    assert refused.stderr == "error: unknown arguments: --port 1 (see reranker serve --help)\n"
    python = [str(Path(command).with_name("python")), "-c", "import reranker; print(reranker.__file__)"]
    done = subprocess.run(python, cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True)
    assert Path(done.stdout).is_relative_to(Path(command).parents[1]), "the wheel's, not the checkout's"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_serve_of_a_wheel_reads_the_settings_of_its_folder(command: str, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / ".env").write_text(f"HOST=127.0.0.1\nPORT={port}\nACCESS_TOKEN=s3cret\n")
    for name in ("app", "config", "reranker", "queue"):  # another project's, or those of a checkout
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the service')\n")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [command, "serve"], cwd=tmp_path, env=environment(PYTHONPATH=""), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        headers = {"Authorization": "Bearer s3cret"}
        transport = httpx.HTTPTransport(retries=20)
        client = httpx.Client(headers=headers, timeout=300, trust_env=False, transport=transport)
        with client:
            while client.get(f"http://127.0.0.1:{port}/health").json() != {"status": "ok"}:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            body = {"query": MODEL[0], "documents": MODEL[1:]}
            ranked = client.post(f"http://127.0.0.1:{port}/v1/rerank", json=body).json()
            assert [row["index"] for row in ranked] == [1, 0]
            assert client.get(f"http://127.0.0.1:{port}/info").json()["version"] == __version__
            assert client.get(f"http://127.0.0.1:{port}/openapi.json").json()["info"]["version"] == __version__
    finally:
        process.terminate()
        code = process.wait(300)
    assert code == 0
