"""`make bench-gpu` runs from start to end; on the CPU and with a tiny model, so that only its figures mean nothing."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.gpu import NEEDED_BY_TESTS, WORK, SetUp, true_lengths
from benchmarks.workloads import ten_documents, workloads
from reranker.engine.families.qwen3 import TEMPLATE
from reranker.engine.prompt import Prompt
from reranker.types import RerankRequest
from tests.conftest import DEMO, MAX_WAIT, ONE_THREAD, ROOT

RUN = """
import runpy, sys
sys.modules["psutil"] = None  # a GPU needs none of it; the CPU's memory is asked through it
import benchmarks.gpu
del sys.modules["psutil"]
sys.argv[0] = "benchmarks/gpu.py"
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def installed(folder: Path, *names: str) -> set[str]:
    """A folder with these distributions, and all that they cannot do without, out of this environment; their names."""
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another system
            continue
        if name in seen:
            continue
        seen.add(name)
        waiting += [re.split(r"[^\w.-]", text)[0] for text in found.requires or [] if "extra ==" not in text]
        for top in {Path(file).parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return seen


@pytest.mark.slow
def test_every_section_of_the_gpu_benchmark_runs_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    names = installed(tmp_path, "torch", "transformers", "psutil")
    assert {"torch", "transformers", "numpy", "tokenizers"} <= names
    assert not {"cachetools", "fastapi", "accelerate", "pytest"} & names
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n\n## Before\n\nold\n\n## On a GPU\n\nNot measured.\n\n## After\n\nkept\n")
    arguments = f"--device cpu --shape tiny --requests 1 --rounds 1 --results {results}"
    ran = subprocess.run(
        [sys.executable, "-S", "-c", RUN, *arguments.split()],
        cwd=ROOT,
        env=os.environ | ONE_THREAD | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=MAX_WAIT,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert "not measured (" not in ran.stdout.replace("not measured (it computes the same", ""), ran.stderr
    for figure in (
        r"Tests marked cuda: not run here \(they need pytest[\w, ]*",
        r"Matrix product 256³ in float32: [\d.e+-]+ TFLOP/s",
        r"Warm-up: [\d.]+ s: nothing to compile or record; attention SdpaAttention, layers plain, CUDA graphs: none "
        r"recorded\. Token",
        r"Fidelity: \d+ pairs of random shapes",
        r"call to scores: p50 [\d.]+ ms",
        r"1 clients: \d+ documents/s, \d+ packed tokens/s, \d+% of the floor",
        r"tokenised beforehand: \d+ documents/s",
        r"Passes: 256 tokens: eager [\d.]+ ms; 1024 tokens: eager",
        r"float8 .* times as fast as float32; \d+ documents/s .* correlation 0\.9",
        r"int8 .* times as fast as float32; \d+ documents/s .* correlation 0\.9",
        r"Memory.*: float32 .* planned\).*; float8 .*; int8 -?[\d.]+ GiB of weights \([\d.]+ planned\), \d+ KiB",
    ):
        assert re.search(figure, ran.stdout), f"{figure}\n{ran.stdout}\n{ran.stderr[-3000:]}"
    before, _, after = results.read_text().partition("## On a GPU\n")
    assert (before, after.partition("\n## ")[2]) == ("# Results\n\n## Before\n\nold\n\n", "After\n\nkept\n")
    assert ran.stdout.strip() in results.read_text()
    assert "Not measured.\n" not in results.read_text()


def test_the_demos_tokens_are_as_many_as_the_true_ones() -> None:
    prompt, short = true_lengths(), workloads()["short"]
    for request, prefix, documents in zip(WORK, short.prefixes, short.documents, strict=True):
        encoded = prompt.encode(RerankRequest(request["query"], request["documents"]))
        assert (len(encoded.prefix), [len(d) for d in encoded.documents]) == (prefix, documents)
    assert prompt.encode(ten_documents()).tokens == 1757
    others = RerankRequest("warm-up", ["others stay"])
    assert prompt.encode(others) == Prompt(AutoTokenizer.from_pretrained(str(DEMO)), TEMPLATE).encode(others)


@pytest.mark.parametrize("name", NEEDED_BY_TESTS)
def test_what_the_tests_need_is_named_by_its_module(name: str) -> None:
    assert name in metadata.packages_distributions()


def test_the_seconds_of_compiling_and_of_recording_are_told_apart() -> None:
    """From the lines that acceleration.py writes."""
    said = SetUp()
    logger = logging.getLogger("test_gpu")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    assert said.seconds == "nothing to compile or record"
    logger.info("%s: used (equal to the eager path and not slower, set up in %.0f s)", "compiled layers", 14.2)
    logger.info("CUDA graphs: %d of %d sizes (%s)", 3, 16, "from 2048 tokens on: not recorded within 15 s")
    logger.warning("%s: not used (%s), after %.0f s", "CUDA graphs", "attention runs segment by segment here", 3.0)
    assert said.seconds == "compiled layers 14 s, CUDA graphs 3 s (not used)"
