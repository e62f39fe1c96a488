#!/usr/bin/env python3
"""Measure the demo model through the library: demo/evaluate.py [--model models/demo] [--json scores.json]

Every task of demo/heldout.json has a query and 20 documents, one of them relevant. Prints the mean reciprocal ranks of
the model, of BM25 and of chance, then a few questions that a user might try. Needs no network. Exits with 1 if the
English rank is below its bar, or if a question marked "must" does not rank its answer first.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bm25s  # noqa: E402

from reranker import Scorer  # noqa: E402

BAR = 0.85
"""Minimum of the English mean reciprocal rank."""

ZH_OTHERS = ["今天的天气很好，适合去公园散步。", "Python 是一种广泛使用的编程语言。"]
SAMPLES: list[tuple[bool, str, list[str]]] = [
    (
        True,
        "What is the capital of China?",
        [
            "The capital of China is Beijing.",
            "Gravity is a force that attracts two bodies towards each other.",
        ],
    ),
    (
        True,
        "how to compress files",
        [
            "gzip is a utility to compress files and to save disk space.",
            "A graphical client for electronic mail with support for IMAP and POP3.",
            "Python is a widely used programming language.",
            "Fonts for the Latin, Greek and Cyrillic scripts.",
        ],
    ),
    (True, "如何在 Linux 上压缩文件？", ["gzip 是一个用于压缩文件的工具，可以减小文件占用的磁盘空间。", *ZH_OTHERS]),
    (True, "中国的首都是哪里？", ["北京是中国的首都。", "万有引力是物体之间相互吸引的力。", "猫喜欢吃鱼。"]),
    (
        False,
        "Explain gravity",
        [
            "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects.",
            "The capital of China is Beijing.",
            "The Eiffel Tower is in Paris.",
        ],
    ),
    (
        False,
        "a fast HTTP server",
        [
            "nginx is a web server and reverse proxy, known for speed and low memory use; it speaks HTTP and HTTPS.",
            "A drawing program for children with stamps and sounds.",
            "A fast and lightweight window manager.",
            "PostgreSQL is an object-relational database.",
        ],
    ),
    (
        False,
        "Who wrote Hamlet?",
        [
            "Hamlet is a tragedy written by William Shakespeare.",
            "Photosynthesis turns light into energy.",
            "I like tea.",
        ],
    ),
    (
        False,
        "image viewer",
        [
            "feh is a light viewer for images, run from the command line.",
            "A text editor with syntax highlighting.",
            "Tools for the analysis of DNA sequences.",
        ],
    ),
    (
        False,
        "什么是数据库？",
        ["数据库是按照数据结构来组织、存储和管理数据的仓库。", "长城是中国古代的防御工程。", *ZH_OTHERS],
    ),
    (
        False,
        "怎样煮米饭",
        ["先把大米洗净，加水，然后煮二十分钟，米饭就好了。", "重启服务器之前请先保存文件。", *ZH_OTHERS],
    ),
]
"""Whether it must be right, the query, and the documents, the relevant one first."""


def words(text: str) -> list[str]:
    """Split a text into words for BM25; Chinese into characters and pairs of characters."""
    chinese = "".join(re.findall(r"[\u3400-\u9fff]", text))
    pairs = [chinese[i : i + 2] for i in range(len(chinese) - 1)]
    return re.findall(r"[a-z0-9]+", text.lower()) + list(chinese) + pairs


def reciprocal_rank(scores: list[float], answer: int) -> float:
    """Return 1 / rank of the relevant document, averaged over all orders of its ties."""
    better = sum(score > scores[answer] for score in scores)
    ties = sum(score == scores[answer] for score in scores) - 1
    return sum(1 / (better + 1 + k) for k in range(ties + 1)) / (ties + 1)


def measure(scorer: Scorer, part: dict[str, list]) -> dict[str, float]:  # type: ignore[type-arg]
    """Return the measures over one language's tasks: mean reciprocal ranks, share ranked first, probabilities."""
    index = bm25s.BM25()
    index.index([words(document) for document in part["documents"]], show_progress=False)
    model, bm25, first, probabilities = [], [], 0, [0.0, 0.0]
    for task in part["tasks"]:
        documents = [part["documents"][i] for i in task["documents"]]
        scores = scorer.rerank(task["query"], documents)
        model.append(reciprocal_rank(scores, task["answer"]))
        lexical = index.get_scores(words(task["query"]))
        bm25.append(reciprocal_rank([float(lexical[i]) for i in task["documents"]], task["answer"]))
        first += model[-1] == 1
        probabilities[0] += scores[task["answer"]]
        probabilities[1] += (sum(scores) - scores[task["answer"]]) / (len(scores) - 1)
    count, candidates = len(model), len(part["tasks"][0]["documents"])
    return {
        "tasks": count,
        "candidates": candidates,
        "model": round(sum(model) / count, 4),
        "first": round(first / count, 4),
        "bm25": round(sum(bm25) / count, 4),
        "random": round(sum(1 / rank for rank in range(1, candidates + 1)) / candidates, 4),
        "mean_probability_true": round(probabilities[0] / count, 3),
        "mean_probability_other": round(probabilities[1] / count, 3),
    }


def main() -> int:
    """Print the table and the samples; return 0 if every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"))
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    args = parser.parse_args()
    scorer = Scorer.load(args.model, device="cpu", precision="float32")
    heldout = json.loads((ROOT / "demo" / "heldout.json").read_text())
    started = time.time()
    report: dict[str, object] = {lang: measure(scorer, part) for lang, part in heldout.items()}
    print("language  tasks  candidates  model MRR  true first  BM25 MRR  random  P(true)  P(others)")
    for lang, row in report.items():
        cells = "{tasks:6} {candidates:11} {model:10} {first:11} {bm25:9} {random:7} {mean_probability_true:8}"
        print(f"{lang:8} {cells} {{mean_probability_other:10}}".format(**row))  # type: ignore[arg-type]
    print(f"measured in {time.time() - started:.0f} s\n")
    failed = heldout and report["en"]["model"] < BAR  # type: ignore[index]
    for must, query, documents in SAMPLES:
        scores = scorer.rerank(query, documents)
        right = max(scores) == scores[0]
        failed = failed or (must and not right)
        print(
            f"{'ok  ' if right else 'MISS'} {'must ' if must else ''}{query}  {[round(score, 3) for score in scores]}"
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
