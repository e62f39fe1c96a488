"""Scorer = prompt + packing + model: texts in, logits out. One per process; synchronous; `max_passes` at a time.

from reranker import Scorer
scorer = Scorer.load("Qwen/Qwen3-Reranker-0.6B")
scorer.rerank("what is a cat?", ["a small animal", "a kind of bread"])   # -> [0.98, 0.01]
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from reranker.engine import device as devices
from reranker.engine.batch import PackedBatch, pack
from reranker.engine.budget import MIN_BATCH_TOKENS, split, split_in_half
from reranker.engine.checkpoint.locate import locate
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.families import open_checkpoint
from reranker.engine.families.base import Family
from reranker.engine.footprint import COMFORTABLE
from reranker.engine.lanes import DealtBatch, Lanes, deal
from reranker.engine.model import Model, load, needed_memory
from reranker.engine.precision import PRECISIONS, choose_precisions, short
from reranker.engine.prompt import Prompt
from reranker.engine.scores import sigmoid
from reranker.engine.self_check import self_check
from reranker.engine.warmup import Rate, choose_budget, warm_up
from reranker.errors import DeviceLostError, InvalidRequestError, ModelLoadError, OutOfMemoryError, ScoringError
from reranker.root import ROOT
from reranker.types import EncodedRequest, ModelInfo, RerankRequest, Slice

logger = logging.getLogger(__name__)

Batch = PackedBatch | DealtBatch
"""The result of `pack` and the argument of `score`."""

NOT_A_NUMBER = "the model gave a score that is not a number; set MODEL_PRECISION=float32"
DEMO = ROOT / "models" / "demo"


class Scorer:
    """Scores requests with one loaded model. Create it with `Scorer.load`.

    Attributes:
        max_batch_tokens: tokens of one forward pass; halved when the device runs out of memory.
        max_batch_documents: documents of one forward pass.
        lanes: on a CPU, the threads that run the parts of a batch side by side; None: one pass with all cores.
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
        self.adapter = ""
        self.lanes: Lanes | None = None

    @classmethod
    @devices.load_errors()
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
        load_timeout: float = 1800.0,
    ) -> Scorer:
        """Load a reranker checkpoint, warm it up and choose the token budget.

        Args:
            name: a hub name such as `Qwen/Qwen3-Reranker-4B`, or a folder; the default is the bundled demo.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            precision: `auto`, `bfloat16`, `float16`, `float32` (or `bf16`, `fp16`, `fp32`), `int8`; on a GPU also
                `float8` (`fp8`).
            max_memory_percentage: limit of this process's share of the device's memory.
            max_seq_length: limit of prompt and document together, in tokens; a longer document is truncated.
            batch_size: max documents in one forward pass; None: limited by the token budget only.
            max_batch_tokens: the token budget of one forward pass; None: measured.
            instruction: the default instruction; None: the one in the checkpoint's own files, else the model card's.
            revision: branch, tag or commit on the hub.
            load_timeout: seconds that the caller gives the load; the compiler of a GPU gets a sixth of them.

        Raises:
            ModelLoadError: it cannot be served; the message says why and how to fix it.
        """
        target = devices.choose_device(device)
        logger.info("device: %s (%s)", target.value, target.reason)
        devices.cap_memory(target.value, max_memory_percentage)
        family = open_checkpoint(locate(str(name), revision))
        max_seq_length = _within_positions(family, max_seq_length)
        prompt = _checked_prompt(family, max_seq_length, instruction)
        _warn_about_length(family, max_seq_length)

        def start(dtype: torch.dtype) -> tuple[Scorer, Rate]:
            model = load(family, target.value, dtype, max_memory_percentage, len(prompt.static_prefix))
            scorer = cls(
                model, prompt, name=str(name), max_batch_tokens=MIN_BATCH_TOKENS, max_batch_documents=batch_size
            )
            scorer.adapter = family.checkpoint.merged
            rate = warm_up(scorer, load_timeout)
            scorer.self_check = self_check(scorer, family.template.instruction or "")
            return scorer, rate

        weights = Weights(family.checkpoint.path, family.checkpoint.adapter, family.checkpoint.scheme)

        def fits(dtype: torch.dtype) -> bool:
            # Not by what is free now: a worker beside others, or after a restart, must not score in another precision.
            need = needed_memory(family, weights, target.value, dtype, prefix_tokens=len(prompt.static_prefix))
            total = devices.memory(target.value, max_memory_percentage).total
            return need.needed <= total * max_memory_percentage / 100 * COMFORTABLE[target.value.type]

        choices = choose_precisions(precision, target.value, weights.precision or weights.half, fits)
        scorer, rate = _first_usable(weights, target.value, precision, choices, start)
        memory = devices.memory(target.value, max_memory_percentage)
        scorer.max_batch_tokens = choose_budget(rate, memory, max_batch_tokens, scorer.max_passes)
        return scorer

    @property
    def info(self) -> ModelInfo:
        """The loaded model and the choices made at load."""
        return ModelInfo(
            name=self.name,
            device=str(self.model.device),
            precision=short(self.model.dtype),
            max_seq_length=self.prompt.max_seq_length,
            max_batch_tokens=self.max_batch_tokens,
            demo=self.demo,
            self_check=self.self_check,
            family=self.model.family,
            score=self.model.head.name,
            prompt=self.prompt.template.source,
            reads_instruction=self.prompt.template.instructed is not None,
            repeats_query=self.prompt.template.repeats_query,
            adapter=self.adapter,
        )

    @property
    def max_passes(self) -> int:
        """Calls of `score` that may run at a time: 2 with lanes, which are not all busy at the end of a batch."""
        return 1 if self.lanes is None else 2

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
        """Pack slices of requests for one forward pass. May run beside `score` in another thread."""
        static_prefix_len, pinned = len(self.model.static_prefix), self.model.device.type == "cuda"
        lanes = 1 if self.lanes is None else self.lanes.count_for(slices)
        if lanes == 1:
            return pack(slices, static_prefix_len=static_prefix_len, pinned=pinned)
        dealt = deal(slices, lanes)
        parts = tuple(pack(lane.slices, static_prefix_len=static_prefix_len) for lane in dealt)
        return DealtBatch(tuple(slices), parts, tuple(lane.positions for lane in dealt))

    def score(self, batch: Batch) -> list[float]:
        """Logits of the batch's documents, in order; may hold NaN, which the caller must not pass on.

        Out of memory halves the token budget and retries the batch in two parts.

        Raises:
            OutOfMemoryError: one document alone does not fit into memory.
            DeviceLostError: the device needs a new process.
        """
        try:
            if self.lanes is not None:
                return self.lanes.run(self.model.forward, batch)
            assert isinstance(batch, PackedBatch)  # `pack` deals for lanes only
            logits: list[float] = self.model.forward(batch).tolist()
            return logits
        except RuntimeError as error:
            if not devices.out_of_memory(error):
                if not devices.lost(error):
                    raise
                # Every further call in this process would fail too.
                raise DeviceLostError("the device failed and the worker restarts; try again", retry_after=10) from error
        # After the handler: its exception holds frames, and they hold the tensors that must be freed first.
        return self._score_in_halves(batch)

    def _score_in_halves(self, batch: Batch) -> list[float]:
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        halves = split_in_half(batch.slices)
        if halves is None:
            raise OutOfMemoryError(
                f"a document of {batch.tokens} tokens does not fit into the device's memory; lower MAX_SEQ_LENGTH"
            )
        lower_limit = min(MIN_BATCH_TOKENS, self.max_batch_tokens)
        self.max_batch_tokens = max(lower_limit, min(self.max_batch_tokens, batch.tokens) // 2)
        logger.warning("out of memory at %d tokens: token budget is now %d", batch.tokens, self.max_batch_tokens)
        return [logit for half in halves for logit in self.score(self.pack(half))]

    def _pack_and_score(self, part: Slice) -> list[float]:
        return self.score(self.pack([part]))

    def rerank(self, query: str, documents: Sequence[str], instruction: str | None = None) -> list[float]:
        """Return relevance scores (probabilities of relevance) in the order of the documents.

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
        if truncated := len(request.truncated):
            logger.warning(
                "%d of %d documents did not fit and were truncated (max_seq_length)", truncated, request.count
            )
        parts = split(request, self.max_batch_tokens, self.max_batch_documents)
        if self.max_passes == 1 or len(parts) == 1:
            passes = list(map(self._pack_and_score, parts))
        else:
            with ThreadPoolExecutor(self.max_passes) as pool:
                passes = list(pool.map(self._pack_and_score, parts))
        logits = [logit for part in passes for logit in part]
        if not all(map(math.isfinite, logits)):
            raise ScoringError(NOT_A_NUMBER)
        return [sigmoid(logit) for logit in logits]


def _checked_prompt(family: Family, max_seq_length: int, requested: str | None) -> Prompt:
    """Refuse a tokenizer that splits prompts differently, and a default instruction that leaves no room."""
    tokenizer, template = family.checkpoint.tokenizer, family.template
    if template.instructed is None:
        unread = requested and "DEFAULT_INSTRUCTION and those of requests are"
        logger.log(
            logging.WARNING if unread else logging.INFO,
            "%s not read: this prompt has none",
            unread or "instructions are",
        )
    elif template.instruction is not None:
        use = "replaced by DEFAULT_INSTRUCTION" if requested else "the default"
        logger.info("the instruction of the checkpoint is %s: %r", use, template.instruction)
    elif template.plain is None and not requested:
        raise ModelLoadError(
            "the prompt of this checkpoint needs an instruction and has no default: set DEFAULT_INSTRUCTION"
        )
    prompt = Prompt(tokenizer, template, max_seq_length=max_seq_length, instruction=requested or None)
    try:
        prompt.encode(RerankRequest("warm-up", ["document"]))
    except InvalidRequestError as error:
        raise ModelLoadError(
            f"the prompt with its default instruction leaves no room for a query and a document in "
            f"MAX_SEQ_LENGTH={max_seq_length}: raise it, or shorten DEFAULT_INSTRUCTION"
        ) from error
    prompt.check(tokenizer)
    return prompt


def _within_positions(family: Family, max_seq_length: int) -> int:
    """Return the limit of a prompt, lowered to the longest one that the model computes."""
    if family.max_positions is None or max_seq_length <= family.max_positions:
        return max_seq_length
    lowered = (
        "MAX_SEQ_LENGTH=%d is lowered to %d tokens, the longest pair of this model: longer documents are truncated"
    )
    logger.info(lowered, max_seq_length, family.max_positions)
    return family.max_positions


def _warn_about_length(family: Family, max_seq_length: int) -> None:
    """Warn if prompts may have more tokens than the model has positions, or than its files allow."""
    if family.max_length is not None and max_seq_length > family.max_length:
        problem = "MAX_SEQ_LENGTH=%d is above %d, where the files of the checkpoint truncate prompts"
        logger.warning(problem + ": longer ones are scored whole", max_seq_length, family.max_length)
    config = family.checkpoint.config
    if family.max_positions is not None:
        return  # MAX_SEQ_LENGTH is at most that
    rope, positions = config.rope_parameters or {}, config.max_position_embeddings
    original = rope.get("original_max_position_embeddings") or positions
    positions = max(positions, int(original * (rope.get("factor") or 1.0)))
    if max_seq_length > positions:
        problem = "MAX_SEQ_LENGTH=%d is above the model's %d positions (max_position_embeddings)"
        logger.warning(problem + ": scores of longer prompts are unreliable", max_seq_length, positions)


def _first_usable(
    weights: Weights,
    device: torch.device,
    precision: str,
    choices: Sequence[devices.Choice[torch.dtype]],
    start: Callable[[torch.dtype], tuple[Scorer, Rate]],
) -> tuple[Scorer, Rate]:
    """Start the model in the first precision of `choices` that gives finite scores on the device.

    Raises:
        ModelLoadError: none does.
    """
    problems: list[str] = []
    for choice in choices:
        name = short(choice.value)
        try:
            started = start(choice.value)
        except (ModelLoadError, OutOfMemoryError) as error:
            reason = str(error)
            if isinstance(error, OutOfMemoryError):
                reason = f"the weights fit, but no forward pass beside them: {devices.MORE_MEMORY}"
            raise ModelLoadError("; ".join([*problems, f"{name}: {reason}"]) if problems else reason) from error
        except ScoringError as error:
            problems.append(f"{name}: {error}")  # not the exception, whose frames hold the model
            logger.warning("precision %s cannot be used: %s", name, str(error))
        else:
            as_requested = precision == "auto" or choice.value is PRECISIONS[precision]
            logger.log(logging.INFO if as_requested else logging.WARNING, "precision: %s (%s)", name, choice.reason)
            return started
        gc.collect()  # the next precision needs this one's memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    reason = f"{weights.path} cannot be scored in any precision on this machine ({'; '.join(problems)})"
    if damaged := weights.not_finite():
        reason = f"the weights are damaged: {damaged} is not finite; download the checkpoint again"
    raise ModelLoadError(reason) from ScoringError(problems[0])
