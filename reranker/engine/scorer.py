"""Scorer = prompt + packing + model: texts in, logits out. One per process; synchronous; one thread at a time.

from reranker import Scorer
scorer = Scorer.load("Qwen/Qwen3-Reranker-0.6B")
scorer.rerank("what is a cat?", ["a small animal", "a kind of bread"])   # -> [0.98, 0.01]
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reranker.engine import device as devices
from reranker.engine.acceleration import accelerate
from reranker.engine.batch import PackedBatch, pack
from reranker.engine.budget import split, split_in_half
from reranker.engine.checkpoint.config import Checkpoint, read
from reranker.engine.checkpoint.layout import default_instruction
from reranker.engine.checkpoint.locate import locate
from reranker.engine.checkpoint.weights import not_finite
from reranker.engine.lanes import MIN_TOKENS, DealtBatch, Lanes, deal
from reranker.engine.model import Model, load
from reranker.engine.precision import PRECISIONS, QUANTIZED, choose_precisions, short
from reranker.engine.prompt import INSTRUCTION, Prompt
from reranker.engine.scores import sigmoid
from reranker.engine.self_check import self_check
from reranker.errors import DeviceLostError, InvalidRequestError, ModelLoadError, OutOfMemoryError, ScoringError
from reranker.types import EncodedRequest, ModelInfo, RerankRequest, Slice

logger = logging.getLogger(__name__)

Batch = PackedBatch | DealtBatch
"""What `pack` makes and `score` takes."""

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"

# A batch should keep the device busy for about this long: longer makes small requests wait, shorter wastes launches.
_BATCH_SECONDS = 0.5
_LEAST_BATCH_TOKENS = 1024
_MOST_BATCH_TOKENS = 262_144
_SLOW_SECONDS = 5.0
"""A model that takes longer for the batch that lanes are tried with is tried with one lane for each core, or none."""
_LANES_PAY = 0.97
"""Lanes are taken, and doubled, where a batch takes at most this share of the time."""
_WARM_UP = "The warm-up document says nothing of interest, but it has about as many words as a short passage. "


@dataclass(frozen=True, slots=True)
class _Rate:
    """What a warm-up pass measured."""

    tokens_per_second: float
    bytes_per_token: float


class Scorer:
    """Scores requests with one loaded model. Make it with `Scorer.load`.

    Attributes:
        max_batch_tokens: tokens of one forward pass; halved when the device runs out of memory.
        max_batch_documents: documents of one forward pass.
    """

    def __init__(
        self, model: Model, prompt: Prompt, *, name: str, max_batch_tokens: int, max_batch_documents: int | None = None
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.demo = Path(name).expanduser().resolve() == DEMO
        self.name = "demo" if self.demo else name
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_documents = max_batch_documents or 1 << 30
        self.self_check = "not run"
        self.lanes: Lanes | None = None
        """On a CPU: what runs the parts of a batch side by side; None: one pass with all cores."""

    @classmethod
    def load(
        cls,
        name: str | Path = DEMO,
        *,
        device: str = "auto",
        precision: str = "auto",
        max_memory_percentage: float = 90.0,
        max_seq_length: int = 8192,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        instruction: str | None = None,
        revision: str | None = None,
    ) -> Scorer:
        """Load a Qwen3-Reranker checkpoint, warm it up and choose the token budget.

        Args:
            name: a hub name such as `Qwen/Qwen3-Reranker-4B`, or a folder; the bundled demo when it is left out.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            precision: `auto`, `bfloat16`, `float16`, `float32` (or `bf16`, `fp16`, `fp32`); `int8` on a CPU, `float8`
                (`fp8`) on a GPU.
            max_memory_percentage: most of the device's memory that this process takes.
            max_seq_length: tokens of prompt and document together; the rest of a document is cut.
            batch_size: most documents in one forward pass; None: as many as the token budget holds.
            max_batch_tokens: the token budget of one forward pass; None: measured.
            instruction: the default instruction; None: the one that the checkpoint's own files name, else the card's.
            revision: branch, tag or commit on the hub.

        Raises:
            ModelLoadError: it cannot be served; the message says why and how to mend it.
        """
        where = devices.choose_device(device)
        logger.info("device: %s (%s)", where.value, where.reason)
        devices.cap_memory(where.value, max_memory_percentage)
        checkpoint = read(locate(str(name), revision))
        own = default_instruction(checkpoint.path, checkpoint.tokenizer)
        if own not in (None, INSTRUCTION):
            use = "is replaced by the one that is set" if instruction else "is the default"
            logger.info("the instruction of the checkpoint %s: %r", use, own)
        _check_length(checkpoint, max_seq_length)
        prompt = Prompt(
            checkpoint.tokenizer, max_seq_length=max_seq_length, instruction=instruction or own or INSTRUCTION
        )
        prompt.check(checkpoint.tokenizer)
        problems: list[str] = []
        for choice in choose_precisions(precision, where.value):
            model = scorer = None
            problem = ""
            try:
                model = load(checkpoint, where.value, choice.value, prompt.yes, prompt.no, max_memory_percentage)
                scorer = cls(model, prompt, name=str(name), max_batch_tokens=_LEAST_BATCH_TOKENS)
                scorer.max_batch_documents = batch_size or scorer.max_batch_documents
                rate = scorer._warm_up()
                scorer.self_check = self_check(scorer, own or INSTRUCTION)
            except OutOfMemoryError as error:
                raise ModelLoadError(f"the weights fit, but no forward pass beside them: {error}") from error
            except InvalidRequestError as error:
                raise ModelLoadError(
                    f"DEFAULT_INSTRUCTION leaves no room for a query and a document in MAX_SEQ_LENGTH={max_seq_length}"
                ) from error
            except ScoringError as error:
                problem = str(error)
            if scorer and not problem:
                asked = precision == "auto" or choice.value is PRECISIONS[precision]
                logger.log(
                    logging.INFO if asked else logging.WARNING,
                    "precision: %s (%s)",
                    short(choice.value),
                    choice.reason,
                )
                scorer._choose_budget(rate, devices.memory(where.value, max_memory_percentage), max_batch_tokens)
                return scorer
            problems.append(f"{short(choice.value)}: {problem}")
            logger.warning("precision %s cannot be used: %s", short(choice.value), problem)
            del model, scorer  # the next one needs the memory
            gc.collect()
            if where.value.type == "cuda":
                torch.cuda.empty_cache()
        raise ModelLoadError(_why(checkpoint.path, problems)) from ScoringError(problems[0])

    @property
    def info(self) -> ModelInfo:
        """What was loaded and chosen."""
        return ModelInfo(
            name=self.name,
            device=str(self.model.device),
            precision=short(self.model.dtype),
            max_seq_length=self.prompt.max_seq_length,
            max_batch_tokens=self.max_batch_tokens,
            demo=self.demo,
            self_check=self.self_check,
        )

    @property
    def memory(self) -> int:
        """Bytes of the device's memory that this process holds."""
        return devices.memory_held(self.model.device)

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Tokenise a request. May run beside `score` in another thread.

        Raises:
            InvalidRequestError: query and instruction leave no room for a document.
        """
        return self.prompt.encode(request, self.model.static_prefix)

    def pack(self, slices: Sequence[Slice]) -> Batch:
        """Lay slices of requests out for one forward pass. May run beside `score` in another thread."""
        static_prefix, pinned = len(self.model.static_prefix), self.model.device.type == "cuda"
        lanes = 1 if self.lanes is None else self.lanes.count_for(slices)
        if lanes == 1:
            return pack(slices, static_prefix=static_prefix, pinned=pinned)
        dealt = deal(slices, lanes)
        parts = tuple(pack(lane.slices, static_prefix=static_prefix) for lane in dealt)
        return DealtBatch(tuple(slices), parts, tuple(lane.positions for lane in dealt))

    def score(self, batch: Batch) -> list[float]:
        """Logits (yes minus no) of the batch's documents, in order; may hold NaN, which the caller must not pass on.

        Out of memory halves the token budget and tries the batch again in two parts.

        Raises:
            OutOfMemoryError: one document alone does not fit into memory.
            DeviceLostError: the device needs a new process.
        """
        try:
            if isinstance(batch, DealtBatch):
                assert self.lanes is not None  # `pack` deals by them
                return self.lanes.run(self.model.forward, batch)
            logits: list[float] = self.model.forward(batch).tolist()
            return logits
        except RuntimeError as error:
            if not _out_of_memory(error):
                if _sticky(error):
                    raise DeviceLostError(
                        "the device failed and the worker restarts; try again", retry_after=10
                    ) from error
                raise
        # Outside the handler: while it holds the exception, its frames hold the tensors that must go.
        parts = split_in_half(batch.slices)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if parts is None:
            raise OutOfMemoryError(
                f"a document of {batch.tokens} tokens does not fit into the device's memory; lower MAX_SEQ_LENGTH"
            )
        least = min(_LEAST_BATCH_TOKENS, self.max_batch_tokens)
        self.max_batch_tokens = max(least, min(self.max_batch_tokens, batch.tokens) // 2)
        logger.warning("out of memory at %d tokens: token budget is now %d", batch.tokens, self.max_batch_tokens)
        return [logit for part in parts for logit in self.score(self.pack(part))]

    def rerank(self, query: str, documents: Sequence[str], instruction: str | None = None) -> list[float]:
        """Return relevance scores (probabilities of "yes") in the order of the documents.

        Raises:
            InvalidRequestError: the query is empty, a document is no string, or query and instruction leave no room for
                a document.
            ScoringError: the model gave a score that is not a number.
        """
        if not isinstance(query, str) or not query.strip():
            raise InvalidRequestError("query: must be a string that is not empty")
        if isinstance(documents, str) or not all(isinstance(document, str) for document in documents):
            raise InvalidRequestError('documents: must be a list of strings, such as ["a", "b"]')
        request = self.encode(RerankRequest(query, documents, instruction))
        if request.truncated:
            logger.warning(
                "%d of %d documents did not fit and were truncated (max_seq_length)",
                len(request.truncated),
                request.count,
            )
        logits: list[float] = []
        for part in split(request, self.max_batch_tokens, self.max_batch_documents):
            logits += self.score(self.pack([part]))
        if not all(map(math.isfinite, logits)):
            raise ScoringError("the model gave a score that is not a number; set MODEL_PRECISION=float32")
        return [sigmoid(logit) for logit in logits]

    def _warm_up(self) -> _Rate:
        """Run the real forward pass, small first; larger passes measure speed and memory.

        Raises:
            ScoringError: a score is not finite, or the precision is not implemented on this device.
        """
        self._measure(self._warm_up_batch(1))  # the plain way must hold before anything is held against it or kept
        self.model.keep(self.prompt.static_prefix)
        accelerate(self.model)
        # A 4B model on a laptop needs seconds for 128 tokens; a GPU has not begun to work below some thousands.
        best = _Rate(0.0, 0.0)
        for count in (1, 8, 64):
            batch = self._warm_up_batch(count)
            start, seconds = time.perf_counter(), 0.0
            for repeat in range(3):  # the first pass is cold, and another may meet a busy machine
                rate, seconds = self._measure(batch)
                best = _Rate(max(best.tokens_per_second, rate.tokens_per_second), rate.bytes_per_token)
                if repeat and time.perf_counter() - start > 2 * _BATCH_SECONDS:
                    break
            if seconds > _BATCH_SECONDS / 2:
                break
        if self.model.device.type == "cpu":
            best = self._choose_lanes(count, best)
        return best

    def _choose_lanes(self, documents: int, rate: _Rate) -> _Rate:
        """Set `lanes` to the number that scores a batch fastest, if it is faster than one pass; return its rate."""
        cores = torch.get_num_threads()
        if cores == 1:
            return rate
        a_document = self._warm_up_batch(2).tokens - self._warm_up_batch(1).tokens
        documents = max(documents, 2 * cores, -(-cores * MIN_TOKENS // a_document))  # enough for all lanes
        tokens = self._warm_up_batch(documents).tokens
        best = one = self._fastest(documents)
        counts = {2**i for i in range(1, cores.bit_length()) if 2**i < cores} if one < _SLOW_SECONDS else set()
        for count in sorted(counts | {cores}):
            before, self.lanes = self.lanes, Lanes(count, cores)
            seconds = self._fastest(documents)
            if seconds >= best * _LANES_PAY:
                self.lanes.close()
                self.lanes = before
                break
            if before is not None:
                before.close()
            best = seconds
        logger.info(
            "lanes: %s (%d cores; warm-up ran %.0f tokens/s in one pass with all of them, %.0f so)",
            self.lanes.count if self.lanes else "none, one pass with all cores",
            cores,
            tokens / one,
            tokens / best,
        )
        return _Rate(max(rate.tokens_per_second, tokens / best), rate.bytes_per_token)

    def _fastest(self, documents: int) -> float:
        """Seconds that a batch takes, the best of three."""
        batch, start, fastest = self._warm_up_batch(documents), time.perf_counter(), math.inf
        for _ in range(3):
            fastest = min(fastest, self._measure(batch)[1])
            if time.perf_counter() - start > 2 * _BATCH_SECONDS:
                break
        return fastest

    def _warm_up_batch(self, count: int) -> Batch:
        return self.pack([Slice(self.encode(RerankRequest("warm-up", [_WARM_UP * 2] * count)), 0, count)])

    def _measure(self, batch: Batch) -> tuple[_Rate, float]:
        device = self.model.device
        before = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        try:
            logits = self.score(batch)
        except RuntimeError as error:
            raise ScoringError(f"warm-up failed: {str(error).splitlines()[0]}") from error
        seconds = time.perf_counter() - start
        if not all(map(math.isfinite, logits)):
            raise ScoringError("a warm-up score is not a number")
        config: Any = self.model.decoder.config
        heads = config.num_attention_heads + 4 * config.num_key_value_heads
        width = 4 * config.hidden_size + 2 * config.intermediate_size + 2 * heads * config.head_dim
        bytes_per_token: float = width * QUANTIZED.get(self.model.dtype, self.model.dtype).itemsize
        if device.type == "cuda":  # never less than what must be there: a recorded pass allocates nothing
            measured = (torch.cuda.max_memory_allocated(device) - before) / batch.tokens
            bytes_per_token = max(bytes_per_token, measured)
        return _Rate(batch.tokens / seconds, bytes_per_token), seconds

    def _choose_budget(self, rate: _Rate, memory: devices.Memory, wanted: int | None) -> None:
        """Set `max_batch_tokens` from speed and memory, and say why."""
        by_memory = int(memory.available * 0.8 / rate.bytes_per_token)
        by_speed = int(rate.tokens_per_second * _BATCH_SECONDS)
        self.max_batch_tokens = wanted or max(_LEAST_BATCH_TOKENS, min(by_memory, by_speed, _MOST_BATCH_TOKENS))
        logger.info(
            "token budget: %d a forward pass (%s; warm-up ran %.0f tokens/s, %.1f s of work are %d tokens; memory "
            "would hold %d at %.0f KiB a token, %s)",
            self.max_batch_tokens,
            "asked for" if wanted else "chosen",
            rate.tokens_per_second,
            _BATCH_SECONDS,
            by_speed,
            by_memory,
            rate.bytes_per_token / 1024,
            memory,
        )


def _why(path: Path, problems: list[str]) -> str:
    """Why no precision can be used: damaged weights are only those that are not finite."""
    damaged = not_finite(path)
    if damaged:
        return f"the weights are damaged: {damaged} is not finite; download the checkpoint again"
    return f"{path} cannot be scored in any precision on this machine ({'; '.join(problems)})"


def _check_length(checkpoint: Checkpoint, max_seq_length: int) -> None:
    """Say when prompts may be longer than the positions that the model was made for."""
    config = checkpoint.config
    positions = config.max_position_embeddings
    factor = (config.rope_parameters or {}).get("factor") or 1.0
    original = (config.rope_parameters or {}).get("original_max_position_embeddings") or positions
    positions = max(positions, int(original * factor))
    if max_seq_length > positions:
        logger.warning(
            "MAX_SEQ_LENGTH=%d is above the %d positions that the model was made for (max_position_embeddings): "
            "scores of longer prompts mean little",
            max_seq_length,
            positions,
        )


def _out_of_memory(error: RuntimeError) -> bool:
    """Also in disguise: under MIG an NVML assert, and the CPU allocator's plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("NVML_SUCCESS == r", "not enough memory", "CUDA error: out of memory")
    )


def _sticky(error: RuntimeError) -> bool:
    """A device error after which every further call in this process fails."""
    return isinstance(error, torch.AcceleratorError)
