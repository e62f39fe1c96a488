"""The supply chain: pins above their floors, nothing unpickled, no code of a checkpoint run."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from safetensors.torch import load_file

from reranker import ModelLoadError, Scorer, __version__
from tests.conftest import MAX_WAIT, ROOT, Start

PINS = {
    requirement.name: next(iter(requirement.specifier))
    for requirement in map(
        Requirement, re.findall(r"^([^#\s-]\S*)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    )
}


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("starlette", "1.3.1"),  # CVE-2026-48710: a Host header that bent request.url
        ("transformers", "5.3"),  # CVE-2026-5241, in everything up to 5.2
        ("torch", "2.10"),
        ("httptools", "0.9"),  # the parser whose strictness tests/test_service.py asserts
    ],
)
def test_pins_are_above_their_floors(name: str, floor: str) -> None:
    assert Version(PINS[name].version) >= Version(floor)


def test_everything_is_pinned_and_says_why_it_is_there() -> None:
    assert {pin.operator for pin in PINS.values()} == {"=="}
    for file in ("requirements.txt", "deploy/supply/requirements.txt"):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            assert line.startswith("#") or re.fullmatch(r"[\w-]+==[\w.]+ +# \S.*", line), line


def test_the_lock_has_every_pin_and_a_hash_for_every_package() -> None:
    """`make lock` writes it after each change of requirements.txt."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[a-z])", text, flags=re.M)[1:]
    locked = {canonicalize_name(block.partition("==")[0]): re.split(r"==|[ ;]", block)[1] for block in blocks}
    assert {name: locked.get(canonicalize_name(name)) for name in PINS} == {n: pin.version for n, pin in PINS.items()}
    for block in blocks:
        assert re.match(r"[\w-]+==[\w.]+ ;[^\\]*( \\\n    --hash=sha256:[0-9a-f]{64})+\n", block), block.partition(" ")[
            0
        ]
    assert not re.search(r"^ *--(?!hash)|://", text, re.M), "no index and no address: the hashes tell the files"


# No pickle, in the source

SOURCES = [ROOT / n for n in ("app.py", "config.py", "gunicorn.conf.py")] + [
    path
    for folder in ("reranker", "benchmarks", "studies", "demo", "deploy")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ".cache" not in path.parts  # environments of the peers
]
SOURCES.remove(ROOT / "benchmarks" / "peers.py")  # talks to its own child processes, and serves nobody
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
CALLS = {"torch.load", "torch.hub.load", "numpy.load", "np.load", "yaml.load", "pandas.read_pickle", "pd.read_pickle"}
BARE = {"eval", "exec", "compile", "__import__"}
ONLY = {
    "trust_remote_code": False,
    "use_safetensors": True,
    "allow_pickle": False,
    "weights_only": True,
    "shell": False,
}


def unsafe(source: str) -> list[str]:
    """The constructs of a source that could run data as code: imports, calls and arguments, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module).partition(".")[0]]
        found += [f"{node.lineno}: import {name}" for name in names if name in MODULES]  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS or called in BARE:
            found.append(f"{node.lineno}: {called}")
        for keyword in node.keywords:
            if keyword.arg in ONLY and ast.unparse(keyword.value) != str(ONLY[keyword.arg]):
                found.append(f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
        if called.endswith("ForCausalLM.from_pretrained") and "reranker" in source:
            given = {keyword.arg for keyword in node.keywords}
            found += [f"{node.lineno}: no {name}" for name in sorted({"use_safetensors", "trust_remote_code"} - given)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_data_as_code(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


def test_the_check_itself_finds_what_it_looks_for() -> None:
    for bad in (
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "np.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', use_safetensors=None)",
        "eval('1')",
        "import reranker\nAutoModelForCausalLM.from_pretrained('x')",
    ):
        assert unsafe(bad), bad
    assert unsafe("model.eval()\nAutoModel.from_pretrained('x', use_safetensors=True)") == []


# No pickle, in fact


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.sign}",)


@pytest.fixture
def sign(tmp_path: Path) -> Iterator[Path]:
    """The file that a pickle leaves where it is read; it must not be there in the end."""
    path = tmp_path / "a-pickle-was-read"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists(), "the pickle works"
    path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture
def folder(model_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_path, tmp_path / "model"))


def test_pickled_weights_alone_are_refused(folder: Path, sign: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(sign)))
    with pytest.raises(ModelLoadError, match=r"no \*\.safetensors"):
        Scorer.load(folder, device="cpu")


def test_pickled_weights_beside_others_are_not_read(folder: Path, sign: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil(sign)))
    assert len(Scorer.load(folder, device="cpu").rerank("a", ["b"])) == 1
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ModelLoadError, match=r"neither model\.safetensors nor"):
        Scorer.load(folder, device="cpu")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(sign)))
    with pytest.raises(ModelLoadError, match=r"adapter_model\.bin, a pickle, which is not read"):
        Scorer.load(folder, device="cpu")


@pytest.mark.parametrize("name", ["weights.bin", "../model/weights.bin", "weights.safetensors/../weights.bin", 7, None])
def test_an_index_of_shards_that_names_a_pickle_is_refused(folder: Path, sign: Path, name: object) -> None:
    """transformers itself would open it with torch.load."""
    weights = load_file(folder / "model.safetensors")
    torch.save(weights | {"evil": Evil(sign)}, folder / "weights.bin")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"names files that are not \*\.safetensors"):
        Scorer.load(folder, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"index\.json is not (JSON|a JSON object|an index of shards)"):
        Scorer.load(folder, device="cpu")


def test_code_of_a_tokenizer_does_not_run(folder: Path, sign: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.system('touch {sign}')")
    assert len(Scorer.load(folder, device="cpu").rerank("a", ["b"])) == 1


HOOK = """
import sys
def hook(event, arguments):
    if event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo"):
        with open({path!r}, "a") as file:
            file.write(event + " " + " ".join(map(str, arguments)) + "\\n")
sys.addaudithook(hook)
import pickle
pickle.loads({trial!r})
"""


@pytest.mark.slow
def test_the_running_service_unpickles_nothing_and_calls_nobody(start: Start, tmp_path: Path) -> None:
    """Python reports every class that a pickle names, and every connection: there is none from start to end."""
    seen = tmp_path / "seen"
    hook = HOOK.format(path=str(seen), trial=pickle.dumps(os.getcwd))
    (tmp_path / "sitecustomize.py").write_text(hook)
    server = start(PYTHONPATH=f"{tmp_path}:{ROOT}", WORKERS="2", MODEL_DEVICE="cpu")
    body = {"query": "how to compress files", "documents": ["gzip", {"text": "chess"}], "max_chunks_per_doc": 2}
    for path in ("/v1/rerank", "/rerank"):
        assert server.client.post(path, json=body).status_code == 200
    assert server.client.get("/metrics").status_code == 200
    assert server.stop() == 0
    assert set(seen.read_text().splitlines()) == {"pickle.find_class posix getcwd"}, "the hook's own trial alone"


# The make targets

SUPPLY = ROOT / "deploy" / "supply"
FAKE_AUDIT = """#!{python}
import json, os, pathlib, sys
answer = next(a.partition("=")[2] for a in sys.argv if a.startswith("--output="))
asked = [line.partition("==") for line in pathlib.Path(sys.argv[-1]).read_text().split()]
mode = os.environ["MODE"]
if mode == "no network":
    sys.exit(1)
def row(name, version):
    if mode == "mirror" or (mode == "half" and name == "torch"):
        return {{"name": name, "skip_reason": "not found"}}
    bad = name == "jinja2" and version == "2.4.1" and mode != "no advisories" or mode == "bad" and name == "starlette"
    return {{"name": name, "version": version, "vulns": [{{"id": "PYSEC-1"}}] * bad}}
pathlib.Path(answer).write_text(json.dumps({{"dependencies": [row(n, v) for n, _, v in asked]}}))
"""


@pytest.mark.parametrize(
    ("mode", "code", "words"),
    [
        ("fine", 0, "0 with known vulnerabilities"),
        ("bad", 1, "starlette"),
        ("half", 2, "Not known there: torch."),
        ("mirror", 2, "could not be asked for"),
        ("no advisories", 2, "could not be asked for"),
        ("no network", 2, "could not be asked for"),
    ],
)
def test_an_audit_says_whether_it_could_ask(tmp_path: Path, mode: str, code: int, words: str) -> None:
    """pip-audit itself calls a network without advisories a success."""
    tool = tmp_path / "pip-audit"
    tool.write_text(FAKE_AUDIT.format(python=sys.executable))
    tool.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    site = sysconfig.get_path("purelib")
    done = subprocess.run(
        [str(tmp_path / "python"), str(SUPPLY / "audit.py"), site, str(ROOT / "requirements.txt")],
        env=os.environ | {"MODE": mode, "PYTHONPATH": site},
        capture_output=True,
        text=True,
        timeout=MAX_WAIT,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr


def test_the_packages_of_the_service_are_those_it_imports_and_no_tools_of_the_tests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SUPPLY))
    packages = importlib.import_module("packages")
    installed = packages.environment(sysconfig.get_path("purelib"))
    found = packages.needed((ROOT / "requirements.txt").read_text(encoding="utf-8"), installed)
    assert set(map(canonicalize_name, PINS)) <= set(found)
    assert {"numpy", "jinja2", "anyio", "click"} <= set(found), "what these need is there"
    assert not {"pytest", "hypothesis", "mypy", "ruff", "schemathesis", "playwright", "matplotlib"} & set(found)
    with pytest.raises(SystemExit, match="nowhere is not installed"):
        packages.needed("nowhere==1 # a reason", installed)
    document = {
        "bomFormat": "CycloneDX",
        "components": [{"bom-ref": n, "name": n} for n in ("Torch", "jinja2", "pytest")],
        "dependencies": [{"ref": "Torch", "dependsOn": ["pytest", "jinja2"]}, {"ref": "pytest"}, {"ref": "jinja2"}],
    }
    assert packages.reduce(document, {"torch", "jinja2"}) == {
        "bomFormat": "CycloneDX",
        "components": [{"bom-ref": n, "name": n} for n in ("Torch", "jinja2")],
        "dependencies": [{"ref": "Torch", "dependsOn": ["jinja2"]}, {"ref": "jinja2", "dependsOn": []}],
    }


def test_make_help_names_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert targets[0] == "serve", "`make` alone serves"
    assert not [target for target in targets if not re.search(rf"(make|\|) {target}( \||\n)", shown)]
    assert "PYTHON=python3.12" in shown


def test_what_the_security_policy_names_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`make ([a-z-]+)`", text)
    assert {"audit", "sbom"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target
    files = re.findall(r"`((?:docs|tests|deploy|reranker)/[^`]*|[\w.-]+\.(?:md|txt|yml|py))`", text)
    assert len(files) >= 5
    for file in [*files, *re.findall(r"\]\(([^)h][^)]*)\)", text)]:
        assert (ROOT / file).exists(), file
    assert not re.search(r"\w@\w", text), "reports go through GitHub"
    assert len(text.splitlines()) <= 80
    assert __version__.rpartition(".")[0] in text
