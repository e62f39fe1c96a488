"""The output folder of a batch, safe against every way to die: a part is finished when its record is there.

part-000000.jsonl    results of part 0, a line for each good row, in order
bad-000000.jsonl     its bad rows, with the reason; there only when it has some
_done/000000.json    its record, written last: what has none is scored (again) by the next run
_batch.json          what the parts are made from; another run may continue only with the same
_summary.json        totals, written when every part is finished
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reranker.batch.parts import Part
from reranker.batch.store import DRAFT, Folder
from reranker.errors import InputError
from reranker.rows.lines import dump

_ABOUT = "_batch.json"
_SUMMARY = "_summary.json"


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a finished part."""

    part: int
    batch: str
    """Which batch it belongs to: an actor that outlives its driver may finish a part of another one in the folder."""
    rows: int
    """Good and bad ones."""
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
    """Seconds of processor time that the actor's process used meanwhile."""

    def row(self) -> dict[str, Any]:
        """As a row of Ray Data."""
        return asdict(self)


class Output:
    """The folder; may be sent to actors."""

    def __init__(self, address: str) -> None:
        self.folder = Folder(address)
        self.batch = ""
        """Fingerprint of what the results depend on; known from `begin` on."""

    def begin(self, identity: dict[str, Any], parts: Sequence[Part], *, overwrite: bool) -> dict[int, Record]:
        """The finished parts, by number, of an earlier run with the same `identity` (JSON values).

        Args:
            identity: what the results depend on.
            parts: all parts there are to be.
            overwrite: forget what is there.

        Raises:
            InputError: the folder holds something else.
            FailedError: it cannot be written.
        """
        self.batch = hashlib.sha256(dump(identity)).hexdigest()[:16]
        names = {name for name in self.folder.names() if not name.startswith((DRAFT, "."))}
        if overwrite:
            self._clear(names)
            names = set()
        about = self.folder.read_if_there(_ABOUT) if _ABOUT in names else None
        if about is None:
            if names:
                raise InputError(
                    f"{self.folder.address} holds {min(names)} and was begun by no batch: name a new or an empty folder"
                )
            self.folder.write(_ABOUT, dump(identity))
            return {}
        if other := _difference(about, identity):
            raise InputError(
                f"{self.folder.address} was begun with another {other}; use the same again, name another folder, or "
                f"--overwrite to start anew"
            )
        return self._finished(names, parts)

    def record(self, part: Part) -> Record | None:
        """The record of a part that is finished."""
        content = self.folder.read_if_there(f"_done/{part.name}.json")
        return self._record(content) if content is not None else None

    def finish(self, part: Part, record: Record, good: list[dict[str, Any]], bad: list[dict[str, Any]]) -> None:
        """Write a part's rows, and then that they are all there.

        Raises:
            FailedError: they cannot be written.
        """
        if bad:
            self.folder.write(f"bad-{part.name}.jsonl", b"".join(map(dump, bad)))
        else:  # what a try that died had found bad, for a reason that is gone
            self.folder.remove([f"bad-{part.name}.jsonl"])
        self.folder.write(f"part-{part.name}.jsonl", b"".join(map(dump, good)))
        self.folder.write(f"_done/{part.name}.json", dump(record.row()))

    def close(self, summary: dict[str, Any]) -> None:
        """Every part is finished: say so, and take away what killed processes left."""
        self.folder.remove([name for name in self.folder.names() if name.startswith(DRAFT)])
        self.folder.write(_SUMMARY, dump(summary))

    def _finished(self, names: set[str], parts: Sequence[Part]) -> dict[int, Record]:
        done = self.folder.names("_done")
        named = [f"_done/{p.name}.json" for p in parts if f"{p.name}.json" in done and f"part-{p.name}.jsonl" in names]
        found = [record for content in self.folder.read(named) if (record := self._record(content))]
        weights = {record.weights for record in found}
        if len(weights) > 1:
            raise InputError(
                f"the parts in {self.folder.address} were scored with {len(weights)} different models under one name: "
                f"make them the same on every node, and start anew with --overwrite"
            )
        return {record.part: record for record in found}

    def _clear(self, names: set[str]) -> None:
        """Records first: whatever is left by a death in between counts as not finished."""
        self.folder.remove([f"_done/{name}" for name in self.folder.names("_done")])
        ours = [name for name in names if name.startswith(("part-", "bad-")) or name in (_SUMMARY, _ABOUT)]
        self.folder.remove(sorted(ours, key=lambda name: name == _ABOUT))

    def _record(self, content: bytes) -> Record | None:
        try:
            record = Record(**json.loads(content))
        except (ValueError, TypeError):  # half of one, left by a store that shows files while they are written
            return None
        return record if record.batch == self.batch else None


def _difference(about: bytes, identity: dict[str, Any]) -> str | None:
    """What differs in the folder's own description."""
    try:
        begun = json.loads(about)
        differs = [key for key in identity | begun if begun.get(key) != identity.get(key)]
    except (ValueError, TypeError, AttributeError):
        return "program"
    return " and another ".join(differs) or None
