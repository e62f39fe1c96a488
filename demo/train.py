#!/usr/bin/env python3
"""Train the demo reranker from scratch on a CPU: demo/train.py [--cache demo/.cache] [--out models/demo]

Run demo/data.py first. A `Qwen3ForCausalLM` of 3 million parameters learns to answer "yes" or "no" to the model card's
prompt. Trained with yes / no alone, a model of this size learns nothing for a long time, because one bit per document
is a weak signal for attention. Three measures help:

- The initial weights already match equal words (see network.py).
- Linear probes, dropped after training, predict for every document token after the matching layer whether it occurs in
  the query, and at the last token the share of the query that was matched.
- A group's documents share the computation of their prefix, as in the engine, so that the full prompt costs little.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from batches import Batch, Sampler
from network import MATCH_LAYER, answer, forward, new_model
from tokenizer import train as train_tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update of each matrix (Jordan et al. 2024).

    In float32, because torch's implementation rounds to bfloat16, which is slow on a CPU without AMX.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update once, scaled like AdamW (Moonlight, arXiv 2502.16982)."""
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 0.05)
                x = matrix.grad.lerp(momentum, 0.95)
                x = x.T if x.shape[0] > x.shape[1] else x
                x = x / (x.norm() + 1e-9)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                x = x.T if matrix.shape[0] > matrix.shape[1] else x
                matrix.add_(x, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


class Probes(nn.Module):
    """Linear probes that are dropped after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.match = nn.Linear(width, 1)
        self.coverage = nn.ModuleList([nn.Linear(width, 1), nn.Linear(width, 1)])


def loss_of(
    model: Qwen3ForCausalLM, probes: Probes, batch: Batch, ids: tuple[int, int]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss (ranking, calibration, both probes) and its parts."""
    states, last = forward(model, batch)
    rows = torch.arange(len(last))
    logits = answer(model, states[-1][rows, last], *ids).view(len(batch.prefix), -1)
    ranking = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    target = torch.zeros_like(logits)
    target[:, 0] = 1.0
    weight = torch.where(target > 0, 3.0, 1.0)
    calibration = F.binary_cross_entropy_with_logits(logits, target, weight)
    judged = batch.match >= 0
    wanted = batch.match[judged].float()
    found = probes.match(states[MATCH_LAYER + 1][judged])[:, 0]
    match = F.binary_cross_entropy_with_logits(found, wanted, torch.where(wanted > 0, 4.0, 1.0))
    coverage = logits.new_zeros(())
    for probe, state in zip(probes.coverage, states[MATCH_LAYER + 2 :], strict=True):
        coverage = coverage + F.binary_cross_entropy_with_logits(probe(state[rows, last])[:, 0], batch.coverage)
    with torch.no_grad():
        report = {
            "ranking": ranking.item(),
            "calibration": calibration.item(),
            "match": match.item(),
            "coverage": coverage.item() / 2,
            "recall": wanted[found > 0].sum().item() / max(1.0, wanted.sum().item()),
            "precision": wanted[found > 0].sum().item() / max(1, int((found > 0).sum())),
            "first": (logits.argmax(1) == 0).float().mean().item(),
        }
    return ranking + 0.5 * calibration + match + coverage, report


@torch.inference_mode()
def reciprocal_rank(model: Qwen3ForCausalLM, batches: list[Batch], ids: tuple[int, int]) -> float:
    """Return the mean reciprocal rank of each group's first document; ties count against it."""
    ranks = []
    for batch in batches:
        states, last = forward(model, batch)
        logits = answer(model, states[-1][torch.arange(len(last)), last], *ids).view(len(batch.prefix), -1)
        ranks += [1.0 / (1 + (row[1:] >= row[0]).sum().item()) for row in logits]
    return sum(ranks) / len(ranks)


def dev_batches(sampler: Sampler, lang: str, count: int) -> list[Batch]:
    """Make held-out tasks: one relevant among 20 documents, none of them in demo/heldout.json."""
    sampler.rng.seed(3)
    chosen = sampler.rng.sample(sampler.with_query[lang], count)
    batches = []
    for start in range(0, count, 5):
        groups = []
        for true in chosen[start : start + 5]:
            others = sampler.rng.sample([i for i in sampler.with_query[lang] if i != true], 19)
            ids = sampler.tokenizer.encode(f" {sampler.pairs[true]['query']}\n<Document>:").ids
            documents = [sampler.documents[i][:200] for i in [true, *others]]
            blank = [d * 0 - 1 for d in documents]
            groups.append((sampler.head + sampler.instructions[0] + ids, documents, blank, [0.0] * 20))
        batches.append(sampler.collate(groups))
    return batches


def export(model: Qwen3ForCausalLM, tokenizer_folder: Path, out: Path) -> None:
    """Write the model in bfloat16; each file is replaced atomically, so that a reader never sees a partial one."""
    staging = out.parent / f".{out.name}.new"
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(state, strict=False)
    copy.save_pretrained(staging)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (staging / name).write_bytes((tokenizer_folder / name).read_bytes())
    out.mkdir(parents=True, exist_ok=True)
    for file in staging.iterdir():
        file.chmod(0o644)
        os.replace(file, out / file.name)
    staging.rmdir()


def main() -> None:
    """Train, and report and export at intervals."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=here / ".cache")
    parser.add_argument("--out", type=Path, default=here.parent / "models" / "demo")
    parser.add_argument("--steps", type=int, default=660)
    parser.add_argument("--tokens", type=int, default=8000, help="tokens per step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate-every", type=int, default=220, help="steps between evaluations and exports")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(args.threads)
    pairs = [json.loads(line) for line in (args.cache / "corpus.jsonl").read_text().splitlines()]
    committed = {t["query"] for part in json.loads((here / "heldout.json").read_text()).values() for t in part["tasks"]}
    training = [p for p in pairs if not p["held_out"]]
    texts = {lang: [p["query"] + "\n" + p["document"] for p in training if p["lang"] == lang] for lang in ("en", "zh")}
    folder = args.cache / "tokenizer"
    tokenizer = train_tokenizer(texts["en"], texts["zh"], folder)
    ids = (tokenizer.token_to_id("yes"), tokenizer.token_to_id("no"))
    sampler = Sampler(training, tokenizer, seed=1)
    other = Sampler([p for p in pairs if p["held_out"] and p["query"] not in committed], tokenizer, seed=2)
    dev = {lang: dev_batches(other, lang, 60) for lang in ("en", "zh")}

    model = new_model(tokenizer)
    probes = Probes(model.config.hidden_size)
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=4e-3),
        torch.optim.AdamW(
            [{"params": rest}, {"params": list(probes.parameters())}], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {len(training)} documents",
        flush=True,
    )
    curve: list[dict[str, float]] = []
    recent: list[dict[str, float]] = []
    started, cpu = time.time(), time.process_time()
    for step in range(1, args.steps + 1):
        # Linear warm-up over 30 steps, constant, linear decay to zero over the second half.
        factor = min(1.0, step / 30, 2 * (args.steps - step + 1) / args.steps)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        batch = sampler.batch(args.tokens, 8, hard=min(0.35, step / args.steps))
        loss, report = loss_of(model, probes, batch, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(report)
        evaluate = step % args.evaluate_every == 0 or step == args.steps
        if step % 20 and not evaluate:
            continue
        mean = {key: round(sum(r[key] for r in recent) / len(recent), 3) for key in report}
        minutes = round((time.process_time() - cpu) / 60, 2)
        row = {"step": step, "cpu_minutes": minutes, "minutes": round((time.time() - started) / 60, 2), **mean}
        recent = []
        if evaluate:
            row |= {f"dev_mrr_{lang}": round(reciprocal_rank(model, tasks, ids), 3) for lang, tasks in dev.items()}
            export(model, folder, args.out)
        curve.append(row)
        print(json.dumps(row), flush=True)
        if evaluate:
            (args.out / "curve.json").write_text("[\n" + ",\n".join(map(json.dumps, curve)) + "\n]\n")


if __name__ == "__main__":
    main()
