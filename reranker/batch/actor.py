"""An actor: a Scorer in a process of its own on a node of the cluster, which scores parts.

It reads its part and writes the results itself, so texts and scores never pass through Ray's object store, and a thread
of `rerank_many` reads and tokenises while the device computes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import ray

from reranker.batch.output import COUNTS, Output, PartRecord
from reranker.batch.parts import Part, records
from reranker.batch.scoring import Note, Totals, answers
from reranker.errors import CommandError, DeviceLostError, ModelLoadError, RerankError
from reranker.notes import MAX_NOTES
from reranker.rankers.ranker import Ranker, Scored
from reranker.rows.row import Defaults, read_row
from reranker.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class ActorConfig:
    """Everything that the actors of a batch have in common."""

    model: ModelSettings
    output: Output
    defaults: Defaults
    weights: str | None
    """Fingerprint of the model that scored the finished parts; None: no part is finished."""


class Actor:
    """Loads the model once, then scores one part after another."""

    def __init__(self, config: ActorConfig) -> None:
        self.config = config
        self.problem = ""
        self.id = ray.get_runtime_context().get_actor_id()
        from reranker.rankers.local import Local  # torch: the driver, which imports this module, does not need it

        try:
            self.ranker: Ranker = Local(config.model)
            self.weights = fingerprint(config.model.model_name_or_path or None, config.model.model_revision or None)
        except ModelLoadError as error:
            self.problem = str(error)
            return
        if config.weights not in (None, self.weights):
            cause = f"the files of the model on {os.uname().nodename} differ from those that scored the finished parts"
            self.problem = f"{cause}: restore them, or start anew with --overwrite"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score a part; return a row of Ray Data: a PartRecord with `notes` (JSON), or `part` and `error`."""
        part, notes = Part(**row), dict[str, str]()

        def note(texts: Iterable[str], place: str) -> None:
            notes.update((text, place) for text in texts if text not in notes and len(notes) <= MAX_NOTES)

        if self.problem:
            return {"part": part.number, "error": self.problem}
        try:
            # Ray may pass a part again although an actor that died after its last write has finished it.
            record = self.config.output.record(part) or self._score(part, note)
            return asdict(record) | {"notes": json.dumps(notes)}
        except DeviceLostError as error:
            print(f"{part.file}, part {part.number}: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # only a new process helps; another actor takes the part
        except (CommandError, RerankError) as error:
            return {"part": part.number, "error": f"{part.file}, from {part.unit} {part.first}: {error}"}

    def _score(self, part: Part, note: Note) -> PartRecord:
        started, processor = time.time(), time.process_time()
        good, bad, totals = score(self.ranker, part, self.config.defaults, note)
        record = PartRecord(
            part=part.number,
            batch=self.config.output.batch,
            **{name: getattr(totals, name) for name in COUNTS},
            weights=self.weights,
            actor=self.id,
            process=os.getpid(),
            started=started,
            ended=time.time(),
            processor=time.process_time() - processor,
        )
        self.config.output.finish(part, record, good, bad)
        return record


def score(
    ranker: Ranker, part: Part, defaults: Defaults, note: Note
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Totals]:
    """Return the lines of good rows and of bad rows of a part, and the totals; see `answers` for errors."""
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    totals = Totals()
    for answer in answers(ranker, (read_row(record, defaults) for record in records(part, note)), note):
        lines = good if isinstance(answer.outcome, Scored) else bad
        lines += [{"file": part.file, part.unit: number} | record for number, record in answer.records]
        if isinstance(answer.outcome, Scored) and answer.outcome.query_truncated:
            note(["the query did not fit and was truncated"], f"{answer.rows[0].place}: ")
        totals.add(answer)
    return good, bad, totals


def fingerprint(name: str | None, revision: str | None) -> str:
    """Return the SHA-256 of all files of a model that are read: the same name may later mean another model.

    Raises:
        ModelLoadError: the model is not there.
    """
    from reranker.engine.checkpoint.locate import locate
    from reranker.engine.scorer import DEMO

    digest = hashlib.sha256()
    for path in locate(name or str(DEMO), revision).files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
