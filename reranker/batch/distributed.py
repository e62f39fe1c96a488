"""A batch over Ray: many files in, a folder of parts out. Run again after an interruption, it continues."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from reranker.batch import cluster, parts, store
from reranker.batch.actor import ActorConfig
from reranker.batch.output import Output, PartRecord, totals
from reranker.batch.parts import Part, Scan, digest_of, split_into_parts
from reranker.errors import FailedError, InputError
from reranker.rankers.source import Source
from reranker.rows.row import Defaults
from reranker.terminal import plural


@dataclass(frozen=True, slots=True)
class Job:
    """A batch over Ray: files, folders or patterns in, a folder out, on the disk or on a store."""

    inputs: Sequence[str]
    output: str
    source: Source
    defaults: Defaults
    part_bytes: int
    overwrite: bool
    address: str | None
    pool: cluster.Pool
    verbose: bool


def run(job: Job) -> None:
    """Score all parts, or those that earlier runs did not finish.

    Raises:
        InputError: input or output cannot be used, or not one row can.
        FailedError: scoring failed; finished parts stay.
    """
    files = _files(job)
    with cluster.connected(job.address, verbose=job.verbose):
        _score(job, cluster.scan(files, job.part_bytes))


def _files(job: Job) -> list[str]:
    """Return the addresses of all input files."""
    files = sorted({address for one in job.inputs for address in store.find(one, parts.ENDINGS)})
    for address in files:
        if not address.endswith(parts.ENDINGS):
            raise InputError(f"{address} ends with none of {', '.join(parts.ENDINGS)}: its name must tell its format")
    nested = any(store.inside(job.output, one) for one in job.inputs)
    if nested or any(store.inside(address, job.output) for address in files):
        raise InputError(f"{job.output} lies in the input, or the input in it: name another folder")
    return files


def _score(job: Job, scans: dict[str, Scan]) -> None:
    all_parts = split_into_parts(scans)
    output = Output(job.output)
    # In this order: an output names its manifest by a hash of these bytes.
    manifest = {"input": digest_of(all_parts, scans), "--part-bytes": job.part_bytes}
    manifest |= job.defaults.identity | job.source.identity
    finished = output.begin(manifest, all_parts, overwrite=job.overwrite)
    before = f", {len(finished)} of them finished before" if finished else ""
    _say(f"{plural(len(scans), 'file')}, {plural(len(all_parts), 'part')}{before}")
    records = _score_parts(job, output, finished, [part for part in all_parts if part.number not in finished])
    total = output.close([*finished.values(), *records])
    bad = f"{job.output}/bad-*.jsonl"
    if records:  # without the time to start Ray and to load the model
        seconds = max(record.ended for record in records) - min(record.started for record in records)
        for line in totals(records).summary(seconds, bad):
            _say(line)
    else:
        _say("nothing to do: every part is finished")
    _say(f"{job.output}: {plural(total.rows, 'row')}, {total.bad} bad, {plural(total.documents, 'document')}")
    if total.rows and total.bad == total.rows:
        raise InputError(f"not one of {total.rows} rows could be used; see {bad}")


def _score_parts(
    job: Job, output: Output, finished: dict[int, PartRecord], unfinished: Sequence[Part]
) -> list[PartRecord]:
    """Return the records of the parts that this run scores."""
    records: list[PartRecord] = []
    if not unfinished:
        return records
    model = job.source.model.resolved()  # actors have another working directory
    weights = next((record.weights for record in finished.values()), None)
    for record in cluster.score(unfinished, ActorConfig(model, output, job.defaults, weights), job.pool):
        records.append(record)
        if record.weights != records[0].weights:  # fail before more parts are scored
            name = job.source.model.model_name_or_path
            raise FailedError(f"the nodes hold different models as {name}: make them the same, --overwrite")
    return records


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
