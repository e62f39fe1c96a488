"""The optional ways through the model on a GPU: compiled layers, then recorded passes. Neither is taken on trust.

Each must reproduce the plain way's hidden states on this very device, in time, and be no slower; else one line in the
log says why, and the plain way stays. A CPU gains nothing here: there the products take 80 % of the time.
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

from reranker.engine.attention import VarlenAttention
from reranker.engine.batch import PackedBatch, pack
from reranker.engine.families.qwen3 import LayerFns, after_attention, before_attention
from reranker.engine.graphs import SIZES, Graphs
from reranker.engine.model import Model
from reranker.engine.precision import QUANTIZED
from reranker.types import EncodedRequest, Slice

logger = logging.getLogger(__name__)

# Distance of a document's hidden state from the plain way's, as a share of its length: on average, and of any document.
# In bfloat16, rounding at other places moves it by 3 % in 8 layers and 6 % in 36 (random weights on a CPU; float32 is
# as far away), a rare one by 10 %, and by more where it tips the coarse steps of 8 bits; a wrong computation moves it
# by its whole length.
TOLERANCE, TOLERANCE_QUANTIZED, _FARTHEST = 0.15, 0.3, 0.6
_COMPILE_SECONDS = 40.0
_RECORD_SECONDS = 15.0
_COMPILER = "compile"
# No size of any model's: the compiler takes equal sizes for the same one, and 8B is 4096 wide.
_COMPARED_TOKENS = 16 * 251
# Timings of a few passes on a machine that may do other work: only a clear loss counts, and a millisecond never does.
_SLOWER, _SLOWER_SECONDS = 1.2, 0.001


def accelerate(model: Model) -> None:
    """Set `model.stages` and `model.graphs` to what holds on the model's device. Raises nothing for what does not.

    Torch's own switch, TORCH_COMPILE_DISABLE=1, turns both off.
    """
    if model.device.type != "cuda":
        return
    torch.cuda.empty_cache()  # what was joined or quantised at load left its parts there
    if torch._dynamo.config.disable:
        logger.info("compiled layers and CUDA graphs: off (TORCH_COMPILE_DISABLE=1)")
        return
    for name, set_up in (("compiled layers", compile_layers), ("CUDA graphs", record_passes)):
        start = time.perf_counter()
        # A compiler that was left behind launches kernels of its own, which may not meet a recording.
        reason = "the compiler is not done yet" if _compiling() else _attempt(set_up, model)
        seconds = time.perf_counter() - start
        if reason:
            logger.warning("%s: not used (%s), after %.0f s", name, reason, seconds)
        else:
            logger.info("%s: used (equal to the plain way and no slower, set up in %.0f s)", name, seconds)
    torch.cuda.empty_cache()


def compile_layers(model: Model) -> str:
    """Take compiled stages if they hold; else the reason against them."""
    compiled = compiled_stages()
    batch = sample(_COMPARED_TOKENS, model).to(model.device)
    fast, plain = partial(model.hidden, batch, compiled), partial(model.hidden, batch)
    reason = _in_time(_COMPILE_SECONDS, fast) or differs(fast, plain, tolerance(model)) or slower(fast, plain)
    if not reason:
        model.stages = compiled
    return reason


def compiled_stages() -> LayerFns:
    """The halves of a layer as fused kernels; one compilation serves all layers and any number of tokens."""
    import torch._inductor.config as inductor

    # A dozen kernels: no pool of processes beside a service's workers for that. Holds for this context; see _in_time.
    inductor.compile_threads = 1
    return LayerFns(
        torch.compile(before_attention, dynamic=True, fullgraph=True),
        torch.compile(after_attention, dynamic=True, fullgraph=True),
    )


def record_passes(model: Model) -> str:
    """Take the recorded passes that are no slower, if there are any; else the reason against them. One that computes
    something else, or cannot be recorded, speaks against all.
    """
    if model.kernel is not VarlenAttention:
        return "attention runs segment by segment here"
    graphs = Graphs(lambda batch: model.hidden(batch, model.stages), model.device)
    start, left_out = time.perf_counter(), []
    for tokens in (SIZES[-1], *SIZES[:-1]):  # the largest makes room for all; then those that gain the most
        if time.perf_counter() - start > _RECORD_SECONDS:
            left_out.append(f"from {tokens} tokens on: not recorded within {_RECORD_SECONDS:.0f} s")
            break
        graphs.record(sample(tokens, model))
        # Another batch than the recorded one, and padded: what was recorded must read what is put there.
        batch = sample(tokens - 16, model)
        moved = batch.to(model.device)
        fast, plain = partial(graphs.replay, batch), partial(model.hidden, moved)
        if reason := differs(fast, plain, tolerance(model)):
            return f"{tokens} tokens: {reason}"
        if reason := slower(fast, plain):
            left_out.append(f"{tokens} tokens: {reason}")
            graphs.forget(tokens)
    if not len(graphs):
        return left_out[0]
    if left_out:
        logger.info("CUDA graphs: %d of %d sizes (%s)", len(graphs), len(SIZES), "; ".join(left_out))
    model.graphs = graphs
    return ""


def sample(tokens: int, model: Model) -> PackedBatch:
    """About so many tokens (128 and more) for a model: two requests of three documents each, any ids; one of them
    begins with the static prefix, or with so much of a long one that all fits its bucket.
    """
    generator = torch.Generator().manual_seed(tokens)
    unit, vocabulary = tokens // 16, model.decoder.config.vocab_size
    slices = []
    for kept in (min(len(model.static_prefix), 64), 0):
        prefix, *documents = (
            torch.randint(vocabulary, (unit * share,), generator=generator).tolist() for share in (1, 2, 2, 3)
        )
        slices.append(Slice(EncodedRequest([0] * kept + prefix, documents, cached_prefix_len=kept), 0, 3))
    return pack(slices, static_prefix=len(model.static_prefix))


def tolerance(model: Model) -> float:
    """What counts as equal in the model's precision."""
    return TOLERANCE_QUANTIZED if model.dtype in QUANTIZED else TOLERANCE


def differs(fast: Callable[[], Tensor | None], plain: Callable[[], Tensor], tolerance: float = TOLERANCE) -> str:
    """How far hidden states [N, hidden_size] are from the plain way's, where that is too far; else nothing."""
    wanted, got = plain(), fast()
    if got is None:
        return "does not take the batch"
    off = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    mean, most = off.mean().item(), off.max().item()
    if not (mean <= tolerance and most <= _FARTHEST):  # a NaN is no agreement
        return f"hidden states differ by {mean:.0%} from the plain way's on average, by {most:.0%} at most"
    return ""


def slower(fast: Callable[[], Tensor | None], plain: Callable[[], Tensor]) -> str:
    """How much longer `fast` takes than `plain`, where it clearly does; else nothing."""
    seconds, needed = _seconds(plain), _seconds(fast)
    if needed > _SLOWER * seconds + _SLOWER_SECONDS:
        return f"slower than the plain way: {1000 * needed:.1f} against {1000 * seconds:.1f} ms"
    return ""


def _seconds(run: Callable[[], Tensor | None]) -> float:
    """The shortest of three runs, device included."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        if (out := run()) is not None:
            out.sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


def _attempt(set_up: Callable[[Model], str], model: Model) -> str:
    try:
        return set_up(model)
    except Exception as error:  # whatever a compiler or a driver raises: the plain way needs none of it
        return _line(error)


def _in_time(seconds: float, work: Callable[[], object]) -> str:
    """Run it in a thread; why it did not end well, or nothing. What takes longer is left behind, unused."""
    failed: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            failed.append(error)

    context = contextvars.copy_context()  # torch keeps what is set of its compiler there
    thread = threading.Thread(target=context.run, args=(run,), name=_COMPILER, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"not ready within {seconds:.0f} s"
    return _line(failed[0]) if failed else ""


def _compiling() -> bool:
    return any(thread.name == _COMPILER for thread in threading.enumerate())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
