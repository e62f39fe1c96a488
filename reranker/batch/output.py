"""An output folder of many parts, on a disk or a store: a part is finished when its record exists.

part-000000.jsonl    results of part 0, a line for each good row, in order
bad-000000.jsonl     its bad rows, with the reasons; only if there are any
_done/000000.json    its record, written last; the next run scores every part without one
_batch.json          the manifest; another run continues only with the same
_summary.json        totals, written when every part is finished
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from reranker.batch import store
from reranker.batch.manifest import continues
from reranker.batch.parts import Part
from reranker.batch.scoring import Totals
from reranker.errors import InputError
from reranker.rows.lines import dump

_MANIFEST = "_batch.json"
_SUMMARY = "_summary.json"
COUNTS = ("rows", "bad", "documents", "truncated")
_READERS = 32
"""Threads: a store takes some ms for each record."""


@dataclass(frozen=True, slots=True)
class PartRecord:
    """Facts about a finished part; its counts are those of `Totals`."""

    part: int
    batch: str
    """Fingerprint of the manifest: an actor that outlives its driver may finish a part of an overwritten batch."""
    rows: int
    bad: int
    documents: int
    truncated: int
    weights: str
    """Fingerprint of the model."""
    actor: str
    process: int
    started: float
    ended: float
    """Seconds since 1970, on the clock of the actor's node."""
    processor: float
    """Seconds of processor time that the actor's process used in between."""


def totals(records: Sequence[PartRecord]) -> Totals:
    """Return the sums of the counts of all records."""
    return Totals(**{name: sum(getattr(record, name) for record in records) for name in COUNTS})


class Output:
    """The folder; can be sent to actors."""

    def __init__(self, address: str) -> None:
        # Absolute, because actors have another working directory.
        self.address = address.rstrip("/") if "://" in address else os.path.abspath(os.path.expanduser(address))
        self.batch = ""
        """Fingerprint of the manifest; set by `begin`."""

    def begin(self, manifest: dict[str, Any], parts: Sequence[Part], *, overwrite: bool) -> dict[int, PartRecord]:
        """Write the manifest, or return the parts, by number, that earlier runs with the same manifest finished.

        Raises:
            InputError: the folder holds something else.
            FailedError: it cannot be written.
        """
        self.batch = hashlib.sha256(dump(manifest)).hexdigest()[:16]
        names = {name for name in store.names(self.address) if not name.startswith((store.DRAFT, "."))}
        if overwrite:
            self._clear(names)
            names = set()
        if _MANIFEST in names:
            continues(store.read(f"{self.address}/{_MANIFEST}"), manifest, self.address)
            return self._finished(names, parts)
        if names:
            cause = f"{self.address} holds {min(names)}"
            raise InputError(f"{cause} and was begun by no batch: name a new or an empty folder")
        store.write(f"{self.address}/{_MANIFEST}", dump(manifest))
        return {}

    def record(self, part: Part) -> PartRecord | None:
        """Return the record of a part; None: it is not finished."""
        try:
            record = PartRecord(**json.loads(store.read(f"{self.address}/_done/{part.name}.json") or b""))
        except (ValueError, TypeError):  # none, or half of one from a store that shows unfinished files
            return None
        return record if record.batch == self.batch else None

    def finish(self, part: Part, record: PartRecord, good: list[dict[str, Any]], bad: list[dict[str, Any]]) -> None:
        """Write the rows of a part, then its record."""
        if bad:
            store.write(f"{self.address}/bad-{part.name}.jsonl", b"".join(map(dump, bad)))
        else:  # an attempt that died may have found bad rows for a reason that is gone
            store.remove(self.address, [f"bad-{part.name}.jsonl"])
        store.write(f"{self.address}/part-{part.name}.jsonl", b"".join(map(dump, good)))
        store.write(f"{self.address}/_done/{part.name}.json", dump(asdict(record)))

    def close(self, records: Sequence[PartRecord]) -> Totals:
        """Write and return the totals of all parts, and delete the drafts of killed processes."""
        for folder in (self.address, f"{self.address}/_done"):
            store.remove(folder, [name for name in store.names(folder) if name.startswith(store.DRAFT)])
        sums = totals(records)
        summary = {"parts": len(records)} | {name: getattr(sums, name) for name in COUNTS}
        store.write(f"{self.address}/{_SUMMARY}", dump(summary))
        return sums

    def _finished(self, names: set[str], parts: Sequence[Part]) -> dict[int, PartRecord]:
        done = store.names(f"{self.address}/_done")
        written = [p for p in parts if f"{p.name}.json" in done and f"part-{p.name}.jsonl" in names]
        with ThreadPoolExecutor(_READERS) as pool:
            records = [record for record in pool.map(self.record, written) if record]
        weights = {record.weights for record in records}
        if len(weights) > 1:
            cause = f"the parts in {self.address} were scored with {len(weights)} different models under one name"
            raise InputError(f"{cause}: make them the same on every node, and start anew with --overwrite")
        return {record.part: record for record in records}

    def _clear(self, names: set[str]) -> None:
        """Delete a batch: records first and the manifest last, so that a death in between leaves no finished part."""
        records = f"{self.address}/_done"
        store.remove(records, store.names(records))
        ours = [name for name in names if name.startswith(("part-", "bad-")) or name in (_SUMMARY, _MANIFEST)]
        store.remove(self.address, sorted(ours, key=lambda name: name == _MANIFEST))
