"""A contestant in a process and an environment of its own: works on commands, each a line of JSON on standard input.

    python -P benchmarks/worker.py KIND OPTIONS      OPTIONS: a JSON object with path, device, precision, threads, ...

The first line of the output says that the model is loaded and its first pass is done. A line with a list of [query,
documents] is answered with seconds, processor seconds and scores; `null` ends the process, which answers with its peak
memory. This file runs in the environments of the peers, so it imports only what its contestant needs.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rerank = Callable[[str, list[str]], list[float]]
"""A query and its documents -> probabilities in document order."""


def ours(path: str, device: str, precision: str, threads: int) -> Rerank:
    """This engine."""
    from reranker import Scorer

    return Scorer.load(path, device=device, precision=precision).rerank


def card(path: str, device: str, precision: str, threads: int, batch: int, all_positions: bool = False) -> Rerank:
    """The model card's code; `all_positions` as it is printed there."""
    import torch

    from benchmarks.card import Card

    made = Card(Path(path), device=device, dtype=getattr(torch, precision))

    def rerank(query: str, documents: list[str]) -> list[float]:
        return list(map(_sigmoid, made.logits(query, documents, batch=batch, all_positions=all_positions)))

    return rerank


def sentence_transformers(
    path: str, device: str, precision: str, threads: int, batch: int, chat_template: str | None
) -> Rerank:
    """sentence-transformers' CrossEncoder, which sorts pairs by length and pads them."""
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        path,
        device=device,
        model_kwargs={"dtype": getattr(torch, precision)},
        processor_kwargs={"chat_template": chat_template} if chat_template else {},
        activation_fn=torch.nn.Sigmoid(),
    )

    def rerank(query: str, documents: list[str]) -> list[float]:
        scores: list[float] = model.predict(
            [(query, document) for document in documents], batch_size=batch, show_progress_bar=False
        ).tolist()
        return scores

    return rerank


def openvino(
    path: str, device: str, precision: str, threads: int, batch: int, streams: int, pair: str | None
) -> Rerank:
    """OpenVINO's CPU plugin on the model as optimum-intel exports it, pairs sorted by length and padded on the left.

    Args:
        path: the model in its classification form.
        device: only cpu.
        precision: float32 or bfloat16.
        threads: of all streams.
        batch: pairs in one inference.
        streams: inferences side by side; 1 is the LATENCY hint, more are THROUGHPUT's.
        pair: the text of a pair, with {query} and {document}; None: the tokenizer joins the two.
    """
    import openvino as ov
    from transformers import AutoTokenizer

    folder = _exported(path)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left" if pair else "right")
    settings = {
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
    }
    compiled = ov.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", settings)
    names = {name for port in compiled.inputs for name in port.names}
    queue = ov.AsyncInferQueue(compiled, streams)

    def rerank(query: str, documents: list[str]) -> list[float]:
        if pair is None:
            encoded = tokenizer([query] * len(documents), documents, truncation=True)
        else:
            texts = [pair.replace("{query}", query).replace("{document}", document) for document in documents]
            encoded = tokenizer(texts, add_special_tokens=False)
        logits = [math.nan] * len(documents)
        order = sorted(range(len(documents)), key=lambda i: -len(encoded["input_ids"][i]))

        def keep(request: Any, places: list[int]) -> None:
            for place, logit in zip(places, request.get_output_tensor(0).data.reshape(-1).tolist(), strict=True):
                logits[place] = logit

        queue.set_callback(keep)
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            padded = tokenizer.pad({name: [of[i] for i in places] for name, of in encoded.items()}, return_tensors="np")
            queue.start_async({name: padded[name] for name in names if name in padded}, places)
        queue.wait_all()
        return list(map(_sigmoid, logits))

    return rerank


def _exported(path: str) -> Path:
    """The folder of the model in OpenVINO's form, exported on the first call."""
    folder = Path(path) / "openvino"
    if not (folder / "openvino_model.xml").exists():
        from optimum.exporters.openvino import main_export

        partial = folder.with_name("openvino.partial")
        main_export(path, output=partial, task="text-classification", ov_config=None)
        partial.rename(folder)
    return folder


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


KINDS: dict[str, Callable[..., Rerank]] = {
    "ours": ours,
    "card": card,
    "sentence_transformers": sentence_transformers,
    "openvino": openvino,
}


def main() -> None:
    """Load the contestant and work until `null` or the end of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    if kind != "openvino":
        import torch

        torch.set_num_threads(options["threads"])
    rerank = KINDS[kind](**options)
    rerank("warm-up", ["a document of a few words"] * 8)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        if work is None:
            break
        start, used = time.perf_counter(), time.process_time()
        scores = [rerank(query, documents) for query, documents in work]
        round_ = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}
        print(json.dumps({**round_, "scores": scores}), file=answers, flush=True)
    print(json.dumps(_peak(options["device"])), file=answers, flush=True)


def _peak(device: str) -> int:
    """Peak memory in bytes: resident on a CPU, allocated on a GPU."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    # ru_maxrss also counts the parent's memory at the fork.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
