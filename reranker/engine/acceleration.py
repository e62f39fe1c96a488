"""Optional faster paths on a GPU: recorded passes and compiled layers.

Each must match eager hidden states on this device, be set up within its time limit, and not be slower than the path
that it replaces; otherwise it is not used and the log says why. A CPU would gain nothing: there the products take 80 %
of the time.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from reranker.engine import device as devices
from reranker.engine.attention import VarlenAttention
from reranker.engine.batch import PackedBatch, pack
from reranker.engine.checkpoint.files import first_line
from reranker.engine.families.base import LayerFns
from reranker.engine.graphs import SIZES, Graphs
from reranker.engine.model import Model
from reranker.engine.precision import QUANTIZED
from reranker.types import EncodedRequest, Slice

logger = logging.getLogger(__name__)

# Distance of a document's hidden state from the eager one, relative to its norm: on average, and of any document.
# Rounding in another order moves it by 3 % in 8 layers and 6 % in 36 in bfloat16 (random weights on a CPU; float32 is
# as far away), a few documents by 10 %, and by more where it changes an 8-bit rounding; a wrong computation moves it
# by its whole norm.
TOLERANCE, TOLERANCE_QUANTIZED, _MAX_DISTANCE = 0.15, 0.3, 0.6
_RECORD_SECONDS = 15.0
# Not a size of any model: the compiler treats equal sizes as one, and 8B is 4096 wide.
_COMPARED_TOKENS = 16 * 251
# A few passes are timed on a machine that may be busy, so only a clear loss of more than a millisecond counts.
_MAX_SLOWDOWN, _MAX_SLOWDOWN_SECONDS = 1.2, 0.001


def accelerate(model: Model, compile_seconds: float) -> None:
    """Set `model.compiled` and `model.graphs` where they pass the checks on the model's device.

    Eager passes are recorded first: a compiler that exceeds its limit still launches kernels, which must not enter a
    recording. Torch's own switch, TORCH_COMPILE_DISABLE=1, turns both off.

    Args:
        model: a model whose eager path works.
        compile_seconds: time limit of the compiler.

    Raises:
        RuntimeError: the device is lost, and the eager path with it.
    """
    if model.device.type != "cuda":
        return
    torch.cuda.empty_cache()  # loading fused or quantised weights and left the originals in the allocator
    if torch._dynamo.config.disable:
        logger.info("compiled layers and CUDA graphs: off (TORCH_COMPILE_DISABLE=1)")
        return
    _set_up("CUDA graphs", record_passes, model)
    _set_up("compiled layers", partial(compile_layers, seconds=compile_seconds), model)
    if model.compiled is not None and model.graphs is not None:
        model.graphs = None
        torch.cuda.empty_cache()
        _set_up("CUDA graphs of the compiled layers", record_passes, model)
    torch.cuda.empty_cache()


def _set_up(name: str, set_up: Callable[[Model], str], model: Model) -> None:
    """Log whether a path is used; raise the error of a lost device only."""
    start = time.perf_counter()
    try:
        reason = set_up(model)
    except Exception as error:  # of a compiler or a driver; the eager path needs neither
        if devices.lost(error) and not devices.works(model.device):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        if devices.out_of_memory(error):
            reason += f": {devices.MORE_MEMORY}"
    seconds = time.perf_counter() - start
    if reason:
        logger.warning("%s: not used (%s), after %.0f s", name, reason, seconds)
    else:
        logger.info("%s: used (equal to the eager path and not slower, set up in %.0f s)", name, seconds)


def compile_layers(model: Model, seconds: float) -> str:
    """Use compiled layers if they are ready within `seconds` and pass the checks; else return the reason."""
    compiled, batch = compile_layer_fns(model.backbone.eager), sample(_COMPARED_TOKENS, model).to(model.device)
    fast, eager = partial(model.hidden, batch, compiled), partial(model.hidden, batch)
    reason = _run_within(seconds, fast) or differs(fast, eager, tolerance(model)) or slower(fast, eager)
    if not reason:
        model.compiled = compiled
    return reason


def compile_layer_fns(eager: LayerFns) -> LayerFns:
    """Return both halves of a layer as fused kernels; one compilation serves all layers and any number of tokens."""
    import torch._inductor.config as inductor

    # A dozen kernels need no process pool beside a service's workers. The setting is this context's; see _run_within.
    inductor.compile_threads = 1
    fused = partial(torch.compile, dynamic=True, fullgraph=True)
    return LayerFns(fused(eager.before), fused(eager.after))


def record_passes(model: Model) -> str:
    """Use the recorded passes that are not slower; return the reason if there are none, or if one fails its check."""
    if not issubclass(model.kernel, VarlenAttention):
        return "attention runs segment by segment here"
    graphs = Graphs(lambda batch: model.hidden(batch, model.compiled), model.device)
    start, skipped = time.perf_counter(), []
    for tokens in (SIZES[-1], *SIZES[:-1]):  # the largest reserves the memory; the smallest gain the most
        if time.perf_counter() - start > _RECORD_SECONDS:
            skipped.append(f"from {tokens} tokens on: not recorded within {_RECORD_SECONDS:.0f} s")
            break
        graphs.record(sample(tokens, model))
        # Not the recorded batch, and padded: the recording must read the new input.
        batch = sample(tokens - 16, model)
        moved, fast = batch.to(model.device), partial(graphs.replay, batch)
        if reason := differs(fast, partial(model.hidden, moved), tolerance(model)):
            return f"{tokens} tokens: {reason}"
        if reason := slower(fast, partial(model.hidden, moved, model.compiled)):
            skipped.append(f"{tokens} tokens: {reason}")
            graphs.drop(tokens)
    if not len(graphs):
        return skipped[0]
    if skipped:
        logger.info("CUDA graphs: %d of %d sizes (%s)", len(graphs), len(SIZES), "; ".join(skipped))
    model.graphs = graphs
    return ""


def sample(tokens: int, model: Model) -> PackedBatch:
    """Return a batch of about `tokens` (128 or more) random tokens: two requests of three documents each.

    One of them begins with the static prefix, or with 64 tokens of a longer one, so that the batch fits its bucket.
    For a model of pairs it is one request of documents with at most 128 tokens, and no more than it has positions.
    """
    generator = torch.Generator().manual_seed(tokens)
    if not model.backbone.causal:
        longest = min(128, model.backbone.positions or 128)
        short, (count, rest) = longest // 4, divmod(tokens, 2 * longest)
        lengths = [short, longest - short, longest] * count + [rest // 2, rest - rest // 2]
        pairs = [torch.randint(model.backbone.vocab_size, (n,), generator=generator).tolist() for n in lengths if n]
        return pack([Slice(EncodedRequest([], pairs), 0, len(pairs))])
    unit, slices = tokens // 16, []
    for cached in (min(len(model.static_prefix), 64), 0):
        prefix, *documents = (
            torch.randint(model.backbone.vocab_size, (unit * share,), generator=generator).tolist()
            for share in (1, 2, 2, 3)
        )
        slices.append(Slice(EncodedRequest([0] * cached + prefix, documents, cached_prefix_len=cached), 0, 3))
    return pack(slices, static_prefix_len=len(model.static_prefix))


def tolerance(model: Model) -> float:
    """Mean distance that counts as equal in the model's precision."""
    return TOLERANCE_QUANTIZED if model.dtype in QUANTIZED else TOLERANCE


def differs(fast: Callable[[], Tensor | None], eager: Callable[[], Tensor], tolerance: float = TOLERANCE) -> str:
    """Return how far hidden states [N, hidden_size] are from the eager ones if that is too far, else ""."""
    expected, actual = eager(), fast()
    if actual is None:
        return "does not accept the batch"
    distance = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    mean, largest = distance.mean().item(), distance.max().item()
    if not (mean <= tolerance and largest <= _MAX_DISTANCE):  # also for NaN
        return f"hidden states differ from the eager path's by {mean:.0%} on average, by {largest:.0%} at most"
    return ""


def slower(fast: Callable[[], Tensor | None], replaced: Callable[[], Tensor]) -> str:
    """Return both times if `fast` is clearly slower than the path that it replaces, else ""."""
    replaced_seconds, seconds = (min(_seconds(run) for _ in range(3)) for run in (replaced, fast))
    if seconds > _MAX_SLOWDOWN * replaced_seconds + _MAX_SLOWDOWN_SECONDS:
        return f"slower than without: {1000 * seconds:.1f} against {1000 * replaced_seconds:.1f} ms"
    return ""


def _seconds(run: Callable[[], Tensor | None]) -> float:
    start = time.perf_counter()
    if (out := run()) is not None:
        out.sum().item()  # waits for the device
    return time.perf_counter() - start


def _run_within(seconds: float, work: Callable[[], object]) -> str:
    """Run `work` in a thread and raise its error; return "", or that it is late: the thread then runs on, unused."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    context = contextvars.copy_context()  # holds torch's compiler settings
    thread = threading.Thread(target=context.run, args=(run,), name="compile", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"not ready within {seconds:.0f} s"
    if errors:
        raise errors.pop()  # a list that held it would be held by its own traceback, and with it the pass's tensors
    return ""
