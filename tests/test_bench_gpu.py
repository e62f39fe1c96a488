"""`make bench-gpu` runs from start to end; on the CPU and with a tiny model, so that only its figures mean nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.conftest import ONE_THREAD, ROOT


def test_every_section_of_the_gpu_benchmark_runs() -> None:
    command = "-m benchmarks.gpu --device cpu --shape tiny --requests 1 --rounds 1 --skip-tests"
    ran = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "not measured (" not in ran.stdout.replace("not measured (it computes the same", ""), ran.stderr
    for figure in (
        r"Matrix product 256³ in float32: [\d.e+-]+ TFLOP/s",
        r"Warm-up: [\d.]+ s; attention SdpaAttention, layers plain, CUDA graphs: none recorded\. Token",
        r"call to scores: p50 [\d.]+ ms",
        r"1 clients: \d+ documents/s, \d+ packed tokens/s, \d+% of the floor",
        r"padded batches, tokenised beforehand: \d+ documents/s",
        r"float8 .* times as fast as float32; \d+ documents/s .* correlation 0\.9",
    ):
        assert re.search(figure, ran.stdout), (figure, ran.stdout, ran.stderr[-3000:])
