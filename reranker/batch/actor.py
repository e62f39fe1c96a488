"""A Scorer in a process of its own on a node of the cluster: it takes parts and gives back what it made of them.

An actor reads its part and writes its results itself, so texts and scores never travel through Ray's object store, and
a thread of `rerank_many` reads and tokenises while the device computes. Expected failures are returned, not raised: Ray
would wrap them in pages of traceback and try again what cannot succeed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from reranker.batch.output import Output, Record
from reranker.batch.part_rows import NOTES, rows
from reranker.batch.parts import Part
from reranker.errors import CommandError, DeviceLostError, ModelLoadError, RerankError
from reranker.rankers.ranker import Ranker, Scored
from reranker.rows.groups import Row, groups, joined
from reranker.settings import ModelSettings
from reranker.types import RerankRequest


@dataclass(frozen=True, slots=True)
class Job:
    """What all actors of a batch have in common."""

    model: ModelSettings
    output: Output
    top_k: int | None
    instruction: str | None
    """Of rows that bring none."""
    weights: str | None
    """Fingerprint of the model that the finished parts were scored with; None: there are none."""


class Actor:
    """Loads the model once, then scores part after part."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.problem = ""
        self.id = ray.get_runtime_context().get_actor_id()
        from reranker.rankers.local import Local  # torch: the process that hands out the parts has no use for it

        try:
            self.ranker: Ranker = Local(job.model)
            self.weights = fingerprint(job.model.model_name_or_path or None, job.model.model_revision or None)
        except ModelLoadError as error:
            self.problem = str(error)
            return
        if job.weights not in (None, self.weights):
            self.problem = (
                f"the files of the model on {os.uname().nodename} are not those of the finished parts: put the same "
                f"ones back, or start anew with --overwrite"
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score a part, given and answered as a row of Ray Data: a Record, or `part` and `error`."""
        part = Part(**row)
        if self.problem:
            return {"part": part.number, "error": self.problem}
        try:
            # An actor that died behind the last write has done it, and Ray asks again.
            return (self.job.output.record(part) or self._score(part)).row()
        except DeviceLostError as error:
            print(f"{part.file}, part {part.number}: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # only a new process helps; Ray starts one
        except (CommandError, RerankError) as error:
            return {"part": part.number, "error": f"{part.file}, from {part.place}: {error}"}

    def _score(self, part: Part) -> Record:
        started, before = time.time(), time.process_time()
        found = score(self.ranker, rows(part, self.job.top_k, self.job.instruction))
        record = Record(
            part=part.number,
            batch=self.job.output.batch,
            rows=len(found.results) + len(found.bad),
            bad=len(found.bad),
            documents=found.documents,
            truncated=found.truncated,
            weights=self.weights,
            actor=self.id,
            process=os.getpid(),
            started=started,
            ended=time.time(),
            processor=time.process_time() - before,
        )
        place = {"file": part.file}
        key = "row" if part.parquet else "line"
        good = [place | {key: number} | result for number, result in found.results]
        bad = [place | {key: number} | result for number, result in sorted(found.bad, key=lambda item: item[0])]
        self.job.output.finish(part, record, good, bad)
        return record


@dataclass(slots=True)
class Outcome:
    """What became of the rows of a part, each with its number."""

    results: list[tuple[int, dict[str, Any]]]
    bad: list[tuple[int, dict[str, Any]]]
    documents: int = 0
    truncated: int = 0


def score(ranker: Ranker, found: Iterator[Row]) -> Outcome:
    """Score rows in full forward passes.

    Raises:
        InputError: they cannot be read.
        RerankError: the model cannot go on; an error of one row alone makes that row a bad one instead.
    """
    done = Outcome([], [])
    waiting: deque[list[Row]] = deque()

    def requests() -> Iterator[RerankRequest]:
        for group in groups(found):
            request = joined(group)
            if request is None:
                done.bad.append((group[0].number, {"id": group[0].id, "error": group[0].error}))
            else:
                waiting.append(group)
                yield request

    for outcome in ranker.rank_many(requests()):
        group = waiting.popleft()
        if not isinstance(outcome, Scored):
            done.bad += [(row.number, {"id": row.id, "error": str(outcome)}) for row in group]
            continue
        done.documents += len(outcome.scores)
        done.truncated += outcome.truncated
        if outcome.query_truncated:
            NOTES.add(["the query did not fit and was truncated"], f"line or row {group[0].number}: ")
        if group[0].pair:
            pairs = zip(group, outcome.scores, strict=True)
            done.results += [(row.number, {"id": row.id, "score": score}) for row, score in pairs]
        else:
            row = group[0]
            best = [{"index": i, "score": outcome.scores[i]} for i in outcome.best(row.top_k)]
            done.results.append((row.number, {"id": row.id, "results": best}))
    return done


def fingerprint(name: str | None, revision: str | None) -> str:
    """SHA-256 of all files of a model that are read: a name may come to mean another model.

    Raises:
        ModelLoadError: it is not there.
    """
    from reranker.engine.checkpoint.locate import FILES, locate
    from reranker.engine.scorer import DEMO

    digest = hashlib.sha256()
    folder = locate(name or str(DEMO), revision)
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
