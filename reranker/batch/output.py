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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from reranker.batch.manifest import continues
from reranker.batch.parts import Part
from reranker.batch.scoring import Totals
from reranker.batch.store import DRAFT, Folder
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
        self.folder = Folder(address)
        self.batch = ""
        """Fingerprint of the manifest; set by `begin`."""

    def begin(self, manifest: dict[str, Any], parts: Sequence[Part], *, overwrite: bool) -> dict[int, PartRecord]:
        """Write the manifest, or return the parts, by number, that earlier runs with the same manifest finished.

        Raises:
            InputError: the folder holds something else.
            FailedError: it cannot be written.
        """
        self.batch = hashlib.sha256(dump(manifest)).hexdigest()[:16]
        names = {name for name in self.folder.names() if not name.startswith((DRAFT, "."))}
        if overwrite:
            self._clear(names)
            names = set()
        content = self.folder.read(_MANIFEST) if _MANIFEST in names else None
        if content is not None:
            continues(content, manifest, self.folder.address)
            return self._finished(names, parts)
        if names:
            raise InputError(
                f"{self.folder.address} holds {min(names)} and was begun by no batch: name a new or an empty folder"
            )
        self.folder.write(_MANIFEST, dump(manifest))
        return {}

    def record(self, part: Part) -> PartRecord | None:
        """Return the record of a part; None: it is not finished."""
        return self._parsed(self.folder.read(f"_done/{part.name}.json"))

    def finish(self, part: Part, record: PartRecord, good: list[dict[str, Any]], bad: list[dict[str, Any]]) -> None:
        """Write the rows of a part, then its record."""
        if bad:
            self.folder.write(f"bad-{part.name}.jsonl", b"".join(map(dump, bad)))
        else:  # an attempt that died may have found bad rows for a reason that is gone
            self.folder.remove([f"bad-{part.name}.jsonl"])
        self.folder.write(f"part-{part.name}.jsonl", b"".join(map(dump, good)))
        self.folder.write(f"_done/{part.name}.json", dump(asdict(record)))

    def close(self, records: Sequence[PartRecord]) -> Totals:
        """Write and return the totals of all parts, and delete the drafts of killed processes."""
        self.folder.remove([name for name in self.folder.names() if name.startswith(DRAFT)])
        sums = totals(records)
        self.folder.write(_SUMMARY, dump({"parts": len(records)} | {name: getattr(sums, name) for name in COUNTS}))
        return sums

    def _finished(self, names: set[str], parts: Sequence[Part]) -> dict[int, PartRecord]:
        done = self.folder.names("_done")
        paths = [f"_done/{p.name}.json" for p in parts if f"{p.name}.json" in done and f"part-{p.name}.jsonl" in names]
        with ThreadPoolExecutor(_READERS) as pool:
            records = [record for content in pool.map(self.folder.read, paths) if (record := self._parsed(content))]
        weights = {record.weights for record in records}
        if len(weights) > 1:
            raise InputError(
                f"the parts in {self.folder.address} were scored with {len(weights)} different models under one name: "
                f"make them the same on every node, and start anew with --overwrite"
            )
        return {record.part: record for record in records}

    def _clear(self, names: set[str]) -> None:
        """Delete a batch: records first and the manifest last, so that a death in between leaves no finished part."""
        self.folder.remove([f"_done/{name}" for name in self.folder.names("_done")])
        ours = [name for name in names if name.startswith(("part-", "bad-")) or name in (_SUMMARY, _MANIFEST)]
        self.folder.remove(sorted(ours, key=lambda name: name == _MANIFEST))

    def _parsed(self, content: bytes | None) -> PartRecord | None:
        try:
            record = PartRecord(**json.loads(content or b""))
        except (ValueError, TypeError):  # half of one, from a store that shows unfinished files
            return None
        return record if record.batch == self.batch else None
