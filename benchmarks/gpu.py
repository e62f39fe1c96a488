"""Everything that a GPU is for, measured by one command within eight minutes: `make bench-gpu`.

    python -m benchmarks.gpu [--shape 4b] [--device cuda] [--seconds 430] [--skip-tests]

Needs torch, transformers and their dependencies, no network and no checkpoint: the model has random weights, made on
the device. Without Qwen3's own tokenizer (`make tokenizer`), the demo's tokens are truncated or repeated to its
counts (tokens.json). Prints a section for RESULTS.md, and writes it there with --results; a part that failed, or ran
out of time, is named as not measured. Runs the tests marked `cuda` first where pytest and the tests' packages are
installed; scores are compared with the card's computation in any case. Exit status 1 where tests or scores are wrong,
a section was not measured, or the GPU was left without compiled layers or graphs. With `--device cpu --shape tiny` it
runs anywhere, which tests/benchmarks/test_gpu.py does.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import itertools
import json
import logging
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.models import CACHE, SHAPES, RandomWeights
from benchmarks.report import header, table, write_section
from benchmarks.workloads import TOKENS, read, ten_documents
from reranker import Scorer
from reranker.engine import device as devices
from reranker.engine.acceleration import sample
from reranker.engine.attention import choose_kernel
from reranker.engine.checkpoint.tokenizer import load_tokenizer
from reranker.engine.checkpoint.weights import EMBEDDING
from reranker.engine.families.base import Head
from reranker.engine.families.decoder import Decoder
from reranker.engine.families.loader import Loader, Wrap
from reranker.engine.families.qwen3 import TEMPLATE
from reranker.engine.footprint import weight_bytes
from reranker.engine.model import Model
from reranker.engine.precision import FLOAT8, QUANTIZED, short
from reranker.engine.prompt import Prompt
from reranker.engine.quantized import quantize
from reranker.engine.scorer import DEMO
from reranker.engine.warmup import choose_budget, warm_up
from reranker.scheduler.batcher import Batcher
from reranker.types import EncodedRequest, RerankRequest, Slice

ROOT = Path(__file__).resolve().parents[1]
TINY = (96, 160, 3, 6, 2, 32, True)
TESTS = [
    "tests/engine/test_attention.py",
    "tests/engine/test_graphs.py",
    "tests/engine/test_quantized.py",
    "tests/engine/test_scorer.py",
]
NEEDED_BY_TESTS = ("pytest", "httpx", "accelerate", "psutil")
WORK = read("short")


class SetUp(logging.Handler):
    """Keeps what acceleration.py says of the paths that it sets up: "compiled layers: used (... in 14 s)"."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line."""
        self.lines.append(record.getMessage())

    @property
    def seconds(self) -> str:
        """Of compiling and of recording, apart."""
        found = (re.match(r"([\w ]+): (not used|used).* (\d+ s)\)?$", line) for line in self.lines)
        parts = [f"{part[1]} {part[3]}{' (not used)' if part[2] != 'used' else ''}" for part in found if part]
        return ", ".join(parts) or "nothing to compile or record"


class WrongError(Exception):
    """Something computes what it should not."""


class TrueLengths(Prompt):
    """The demo's tokenizer; its tokens are truncated or repeated to the counts of Qwen3's own tokenizer."""

    def __init__(self, tokenizer: Any, static_prefix: int, lengths: dict[str, tuple[int, list[int]]]) -> None:
        super().__init__(tokenizer, TEMPLATE)
        self.static_prefix = _fit(self.static_prefix, static_prefix)
        self.lengths = lengths
        """Of the prefix and of each document, by the first document of the request."""

    def encode(self, request: RerankRequest, cached_prefix: Sequence[int] = ()) -> EncodedRequest:
        """Of a request of short.json, or the one of ten documents; another one as it is."""
        encoded = super().encode(request, cached_prefix)
        if request.documents[0] not in self.lengths:
            return encoded
        prefix, documents = self.lengths[request.documents[0]]
        return EncodedRequest(
            [*self.static_prefix, *_fit(encoded.prefix, prefix - len(self.static_prefix))],
            [_fit(tokens, count) for tokens, count in zip(encoded.documents, documents, strict=True)],
            cached_prefix_len=len(cached_prefix),
        )


def true_lengths() -> TrueLengths:
    """Of the requests that are timed here."""
    counted = json.loads(TOKENS.read_text())
    ten, short = counted["ten"], counted["short"]
    lengths = {ten_documents().documents[0]: (ten["prefixes"][0], ten["documents"][0])}
    for request, prefix, documents in zip(WORK, short["prefixes"], short["documents"], strict=True):
        lengths[request["documents"][0]] = prefix, documents
    return TrueLengths(load_tokenizer(DEMO), counted["static_prefix"], lengths)


def _fit(tokens: list[int], count: int) -> list[int]:
    return list(itertools.islice(itertools.cycle(tokens), count))


class Bench:
    """One run, and the figures that later sections use.

    Args:
        shape: a key of SHAPES, or `tiny`.
        device: where to measure.
        requests: requests of short.json to use.
        rounds: how often the clients send them.
    """

    def __init__(self, shape: str, device: torch.device, requests: int, rounds: int) -> None:
        self.device, self.work, self.rounds = device, WORK[:requests], rounds
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        true = CACHE / "tokenizer"
        self.true = (true / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(true if self.true else DEMO)
        self.answers = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
        self.prompt = Prompt(tokenizer, TEMPLATE) if self.true else true_lengths()
        hidden, intermediate, layers, heads, groups, head, tied = TINY if shape == "tiny" else SHAPES[shape]
        settings: dict[str, Any] = {
            "vocab_size": 151_669 if shape != "tiny" else len(self.prompt.text_tokenizer.get_vocab()) + 64,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": head,
            "max_position_embeddings": 40_960,
            "rope_theta": 1_000_000,
            "tie_word_embeddings": tied,
        }
        self.config = Qwen3Config(**settings)
        self.weights = RandomWeights(self.config, device, self.dtype)
        products = hidden * (2 * heads + 2 * groups) * head + 3 * hidden * intermediate
        self.flop_per_token = 2 * layers * products
        self.rate = self.sustained = float("nan")
        self.lost: list[str] = []
        """Accelerated paths that a GPU should have taken and did not."""
        self.scorer: Scorer | None = None
        self.documents_per_second = float("nan")
        self.memory: dict[str, tuple[int, int, float]] = {}
        """By precision: bytes of the loaded weights, those planned for them, and bytes per token of a pass."""

    def make(self) -> Any:
        """transformers' model with the same weights as `load` gives, made on the device in its precision."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                made: Any = Qwen3ForCausalLM(self.config).eval()
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                weight.copy_(self.weights.tensor(name))
        return made

    def load(self, precision: torch.dtype) -> tuple[Scorer, str]:
        """A scorer and the seconds of its warm-up; those of compiling and recording also apart."""
        quantized = precision in QUANTIZED
        wrap: Wrap = (
            (lambda linear, names: quantize(linear, precision)) if quantized else (lambda linear, names: linear)
        )
        rows = self.weights.tensor(EMBEDDING)[self.answers].float()
        kernel, _ = choose_kernel(self.device, self.dtype, self.config.head_dim)
        gc.collect()
        before = self._held()
        backbone = Decoder(Loader(self.weights, self.device, self.dtype, self.dtype, wrap), self.config)
        loaded = self._held() - before
        model = Model(backbone, Head(rows[0] - rows[1]), self.device, precision, kernel)
        scorer = Scorer(model, self.prompt, name="random weights", max_batch_tokens=1024)
        start, logger, said = time.perf_counter(), logging.getLogger("reranker.engine.acceleration"), SetUp()
        logger.addHandler(said)
        try:
            rate = warm_up(scorer)
        finally:
            logger.removeHandler(said)
        scorer.max_batch_tokens = choose_budget(rate, devices.memory(self.device, 90), None)
        planned, _ = weight_bytes(self.weights, precision, self.dtype)
        self.memory[short(precision)] = loaded, planned, rate.bytes_per_token
        return scorer, f"{time.perf_counter() - start:.1f} s: {said.seconds}"

    def matmul(self) -> str:
        """The rate that the floor is made of: one large product on random data, at its best. Under seconds of load a
        GPU may lower its clock, so the sustained rate is reported too.
        """
        size, seconds = (8192, 2.0) if self.device.type == "cuda" else (256, 0.1)
        a, b, out = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(3))

        def multiply(times: int) -> None:
            for _ in range(times):
                torch.mm(a, b, out=out)

        best = self._best(lambda: multiply(1), 10)
        count = max(1, int(seconds / best))
        sustained = self._best(lambda: multiply(count), 1) / count
        self.rate, self.sustained = 2 * size**3 / best, 2 * size**3 / sustained
        return (
            f"Matrix product {size}³ in {short(self.dtype)}: {self.rate / 1e12:.3g} TFLOP/s at best, "
            f"{self.sustained / 1e12:.3g} for {seconds} s."
        )

    def start(self) -> str:
        """Warm-up, and which paths were taken."""
        self.scorer, seconds = self.load(self.dtype)
        return f"Warm-up: {seconds}; {self._paths(self.scorer)}. Token budget {self.scorer.max_batch_tokens}."

    def paths(self) -> str:
        """A recorded pass against the compiled and the eager one, by size; each as a request waits for it."""
        assert self.scorer is not None
        model, lines = self.scorer.model, []
        kept = model.graphs, model.compiled
        try:
            for tokens in (256, 1024, 2048):
                batch, times = sample(tokens, model), {}
                for name, graphs, compiled in (
                    ("recorded", kept[0], kept[1]),
                    ("compiled", None, kept[1]),
                    ("eager", None, None),
                ):
                    model.graphs, model.compiled = graphs, compiled
                    if name == "eager" or (graphs if name == "recorded" else compiled) is not None:
                        times[name] = 1000 * self._best(lambda: model.forward(batch).tolist(), 5)  # noqa: B023
                lines.append(f"{tokens} tokens: {', '.join(f'{name} {ms:.2f} ms' for name, ms in times.items())}")
        finally:
            model.graphs, model.compiled = kept
        return f"Passes: {'; '.join(lines)}."

    def memory_by_precision(self) -> str:
        """What the models above took, against what `check --plan` counts."""
        lines = []
        for name, (loaded, planned, per_token) in self.memory.items():
            sizes = f"{loaded / 2**30:.2f} GiB of weights ({planned / 2**30:.2f} planned)"
            lines.append(f"{name} {sizes}, {per_token / 1024:.0f} KiB a token of a pass")
        how = "" if self.device.type == "cuda" else " (on a CPU: of the process)"
        return f"Memory{how}: {'; '.join(lines)}."

    def fidelity(self) -> str:
        """Scores against the card's computation, one pair at a time, on random shapes: alone, and many in a batch.

        Raises:
            WrongError: they are further apart than rounding can bring them.
        """
        assert self.scorer is not None
        rng = random.Random(23)
        requests = [self._random(rng) for _ in range(24)]
        made = self.make()
        with torch.inference_mode():
            true = torch.tensor([self._pair(made, r.prefix + d) for r in requests for d in r.documents])
        del made
        slices = [Slice(r, 0, len(r.documents)) for r in requests]
        together = torch.tensor(self.scorer.score(self.scorer.pack(slices)))
        alone = torch.tensor([logit for part in slices for logit in self.scorer.score(self.scorer.pack([part]))])
        apart = torch.stack([together, alone]) - true
        neighbours = (together - alone).abs()
        if not apart.abs().max() <= 0.5 * true.std():
            raise WrongError(f"logits are {apart.abs().max():.3f} from the card's, whose deviation is {true.std():.3f}")
        return (
            f"Fidelity: {len(true)} pairs of random shapes against transformers, a pair at a time in "
            f"{short(self.dtype)}: logits of standard deviation {true.std():.2f} differ by "
            f"{apart.abs().mean():.2g} on average, {apart.abs().max():.2g} at most; sharing a batch moves one by "
            f"{neighbours.max():.2g} at most."
        )

    def clients(self) -> str:
        """Eight clients through the batcher, each with a request of its own, again and again."""
        assert self.scorer is not None
        seconds, tokens, documents = asyncio.run(self._serve(self.scorer))
        self.documents_per_second = documents / seconds
        flop = tokens * self.flop_per_token / seconds
        return (
            f"short.json, {len(self.work)} clients: {documents / seconds:.0f} documents/s, "
            f"{tokens / seconds:.0f} packed tokens/s, {flop / self.rate:.0%} of the floor "
            f"({self.flop_per_token / 1e9:.3g} GFLOP a token at the best rate above; "
            f"{flop / self.sustained:.0%} at the other). "
            f"Of each prompt the {len(self.scorer.model.static_prefix)} tokens that the model keeps are not counted."
        )

    def card(self) -> str:
        """The same documents in padded batches sorted by length: the computation of sentence-transformers'
        CrossEncoder, without its host code.
        """
        made = self.make()
        requests = [self._encode(r) for r in self.work[:2]]
        pairs = sorted((r.prefix + document for r in requests for document in r.documents), key=len)
        pairs = pairs if self.device.type == "cuda" else pairs[:20]
        rates = {}
        for batch in (8, 32, 128):
            groups = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
            seconds = self._best(lambda: [_padded(made, group, self.device) for group in groups], 2)  # noqa: B023
            rates[batch] = len(pairs) / seconds
        best = max(rates, key=lambda batch: rates[batch])
        return (
            f"The card's computation in padded batches of documents sorted by length, as sentence-transformers' "
            f"CrossEncoder makes them, tokenised beforehand: {rates[best]:.0f} documents/s at its best batch of "
            f"{best}; the service is {self.documents_per_second / rates[best]:.2f} times as fast. The CrossEncoder "
            f"itself: not measured (it computes the same and tokenises besides)."
        )

    def latency(self) -> str:
        """Ten documents of 100 words from call to scores."""
        assert self.scorer is not None
        ten = ten_documents()
        times = []
        for _ in range(40 if self.device.type == "cuda" else 3):
            start = time.perf_counter()
            self.scorer.rerank(ten.query, ten.documents)
            times.append(time.perf_counter() - start)
        tokens = self.scorer.encode(ten).tokens
        middle = 1000 * statistics.median(times)
        return f"Ten documents of 100 words ({tokens} tokens), call to scores: p50 {middle:.1f} ms."

    def narrow(self, precision: torch.dtype) -> str:
        """8 bits against the precision above: speed of the passes, and the logits."""
        assert self.scorer is not None
        fast, seconds = self.load(precision)
        encoded = [self._encode(r) for r in self.work]
        batch = self.scorer.pack([Slice(e, 0, len(e.documents)) for e in encoded])
        times = 5 if self.device.type == "cuda" else 1
        true, got = (torch.tensor(scorer.score(batch)) for scorer in (self.scorer, fast))
        base, needed = (self._best(lambda: scorer.score(batch), times) for scorer in (self.scorer, fast))  # noqa: B023
        served, _, documents = asyncio.run(self._serve(fast))
        apart, order = (true - got).abs(), torch.corrcoef(torch.stack([true, got]))[0, 1]
        return (
            f"{short(precision)} (warm-up {seconds}; {self._paths(fast)}): a pass of {batch.tokens} tokens "
            f"{base / needed:.2f} times as fast as {short(self.dtype)}; "
            f"{documents / served:.0f} documents/s with {len(self.work)} clients "
            f"({documents / served / self.documents_per_second:.2f} times). "
            f"Logits of standard deviation {true.std():.2f} differ by {apart.mean():.3f} on average, "
            f"{apart.max():.3f} at most; correlation "
            f"{order:.4f}."
        )

    def _paths(self, scorer: Scorer) -> str:
        """The accelerated paths in use; a missing one on a GPU fails the run."""
        model = scorer.model
        compiled = "plain" if model.compiled is None else "compiled"
        recorded = f"{len(model.graphs)} recorded sizes" if model.graphs is not None else "none recorded"
        if self.device.type == "cuda" and None in (model.compiled, model.graphs):
            self.lost.append(f"{short(model.dtype)}: layers {compiled}, {recorded} (the log says why)")
        return f"attention {model.kernel.__name__}, layers {compiled}, CUDA graphs: {recorded}"

    def _random(self, rng: random.Random) -> EncodedRequest:
        """Few documents or many, short or long."""
        vocabulary = self.config.vocab_size

        def tokens(most: int) -> list[int]:
            return [rng.randrange(vocabulary) for _ in range(rng.randrange(1, most))]

        assert self.scorer is not None
        most = rng.choice((10, 100, 600)) if self.device.type == "cuda" else 30
        kept = self.scorer.model.static_prefix[: rng.choice((0, 20, None))]
        documents = [tokens(most) for _ in range(rng.choice((1, 2, 9)))]
        return EncodedRequest([*kept, *tokens(most)], documents, cached_prefix_len=len(kept))

    def _pair(self, made: Any, tokens: list[int]) -> float:
        """The card's logit: of "yes" minus of "no" at the last token, in float32 as the service has it."""
        state = made.model(input_ids=torch.tensor([tokens], device=self.device)).last_hidden_state[0, -1]
        rows = made.model.embed_tokens.weight.detach()[self.answers].float()
        return float(state.float() @ (rows[0] - rows[1]))

    def _encode(self, request: dict[str, Any]) -> EncodedRequest:
        assert self.scorer is not None
        return self.scorer.encode(RerankRequest(request["query"], request["documents"]))

    async def _serve(self, scorer: Scorer) -> tuple[float, int, int]:
        """Seconds, packed tokens and documents of all clients' requests."""
        batcher = Batcher(lambda: scorer)
        await batcher.start()
        await batcher.wait_until_loaded()

        async def client(request: dict[str, Any], rounds: int) -> None:
            for _ in range(rounds):
                await batcher.rerank(RerankRequest(request["query"], request["documents"]), 300)

        try:
            await asyncio.gather(*(client(r, 1) for r in self.work))  # not counted
            start = time.perf_counter()
            await asyncio.gather(*(client(r, self.rounds) for r in self.work))
            seconds = time.perf_counter() - start
        finally:
            await batcher.stop()
        tokens = sum(self._encode(r).tokens for r in self.work) * self.rounds
        return seconds, tokens, sum(len(r["documents"]) for r in self.work) * self.rounds

    def _best(self, run: Callable[[], object], times: int) -> float:
        """Seconds of the shortest run, device included; the first is not counted."""
        found = []
        with torch.inference_mode():
            for _ in range(times + 1):
                self._wait()
                start = time.perf_counter()
                run()
                self._wait()
                found.append(time.perf_counter() - start)
        return min(found[1:])

    def _held(self) -> int:
        if self.device.type != "cuda":
            return devices.memory_held(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    """Run every section that there is time for."""
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="4b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=430)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--results", type=Path, metavar="FILE.md", help="write the section into this file as well")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")  # the paths' own lines, on stderr
    bench = Bench(a.shape, devices.choose_device(a.device).value, a.requests, a.rounds)
    tokens = "the true tokenizer" if bench.true else "the demo's tokenizer, its tokens as many as the true one's"
    section: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        section.append(text)

    say(f"## On a GPU\n\n{header()}\n\nModel {a.shape} (random weights), {tokens}.\n")
    sections: dict[str, Callable[[], str]] = {
        "tests": lambda: _tests(max(30.0, a.seconds / 3)),
        "matrix product": bench.matmul,
        "start": bench.start,
        "fidelity": bench.fidelity,
        "paths": bench.paths,
        "ten documents": bench.latency,
        "eight clients": bench.clients,
        "padded batches": bench.card,
        "float8": lambda: bench.narrow(FLOAT8),
        "int8": lambda: bench.narrow(torch.int8),
        "memory": bench.memory_by_precision,
    }
    if a.skip_tests:
        del sections["tests"]
    rows: list[list[str]] = []
    waiting = list(sections)
    failed = False
    done = threading.Event()

    def give_up() -> None:
        """A section that does not end, in a compiler or a kernel, takes nothing from those before it."""
        if not done.wait(a.seconds + 20):
            for name in waiting:
                print(f"- {name}: not measured (no time left)", flush=True)
            os._exit(1)

    threading.Thread(target=give_up, daemon=True).start()
    for name, run in sections.items():
        start = time.perf_counter()
        try:
            if start - begun > a.seconds:
                raise TimeoutError("no time left")
            say(f"- {run()}")
        except Exception as error:  # the next section may still tell something
            failed = True
            logging.exception("%s failed", name)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            say(f"- {name}: {'WRONG' if isinstance(error, WrongError) else 'not measured'} ({lines[0]})")
        waiting.remove(name)
        rows.append([name, f"{time.perf_counter() - start:.0f}"])
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    done.set()
    say("".join(f"- NOT TAKEN: {lost}\n" for lost in bench.lost) + "\n" + table(["section", "took, s"], rows))
    if a.results:
        write_section(a.results, "\n".join(section))
    sys.exit(failed or bool(bench.lost))


def _tests(seconds: float) -> str:
    """The tests marked `cuda`; a newer or older torch than the pinned one may warn.

    Raises:
        WrongError: one failed, or none was there.
        subprocess.TimeoutExpired: they did not end.
    """
    missing = [name for name in NEEDED_BY_TESTS if importlib.util.find_spec(name) is None]
    if missing:
        return f"Tests marked cuda: not run here (they need {', '.join(missing)}); see fidelity below."
    command = [sys.executable, "-m", "pytest", "-v", "-m", "cuda", "-o", "filterwarnings=default", *TESTS]
    ran = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
    )
    logging.info("%s", ran.stdout)
    summaries = re.findall(r"^.*\d+ (?:passed|failed|skipped|error).*$", ran.stdout, re.M) or ["no summary"]
    if ran.returncode or "passed" not in summaries[-1]:
        raise WrongError(f"{summaries[-1]} (exit status {ran.returncode})")
    return f"Tests marked cuda: {summaries[-1]}."


@torch.inference_mode()
def _padded(made: Any, pairs: list[list[int]], device: torch.device) -> list[float]:
    """Logits at the last position of a batch padded on the left."""
    longest = max(map(len, pairs))
    ids = torch.tensor([[0] * (longest - len(pair)) + pair for pair in pairs]).to(device)
    mask = torch.tensor([[0] * (longest - len(pair)) + [1] * len(pair) for pair in pairs]).to(device)
    logits: list[float] = made(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1, 0].float().tolist()
    return logits


if __name__ == "__main__":
    main()
