"""A batch over Ray: many files in, a folder of parts out. Run again after an interruption, it continues."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from reranker.batch import cluster, parts, store
from reranker.batch.actor import ActorConfig
from reranker.batch.output import Output, PartRecord, totals
from reranker.errors import FailedError, InputError
from reranker.rankers.source import Source
from reranker.rows.row import Defaults
from reranker.terminal import plural


def find_files(inputs: Sequence[str], output: str) -> list[str]:
    """Return the addresses of all files of a batch; `inputs` are files, folders and patterns.

    Raises:
        InputError: input or output cannot be used.
    """
    files = sorted({address for one in inputs for address in store.find(one, parts.ENDINGS)})
    for address in files:
        if not address.endswith(parts.ENDINGS):
            raise InputError(f"{address} ends with none of {', '.join(parts.ENDINGS)}: its name must tell its format")
    if any(store.inside(output, one) for one in inputs) or any(store.inside(address, output) for address in files):
        raise InputError(f"{output} lies in the input, or the input in it: name another folder")
    return files


def run(
    files: Sequence[str],
    folder: str,
    source: Source,
    defaults: Defaults,
    pool: cluster.Pool,
    part_bytes: int,
    *,
    overwrite: bool,
) -> None:
    """Score all parts of files, or those that earlier runs did not finish, into a folder.

    Raises:
        InputError: input or output cannot be used, or not one row can.
        FailedError: scoring failed; finished parts stay.
    """
    scans = cluster.scan(files, part_bytes)
    all_parts = parts.split_into_parts(scans)
    output = Output(folder)
    # In this order: an output names its manifest by a hash of these bytes.
    manifest = {"input": parts.digest_of(all_parts, scans), "--part-bytes": part_bytes}
    finished = output.begin(manifest | defaults.identity | source.identity, all_parts, overwrite=overwrite)
    before = f", {len(finished)} of them finished before" if finished else ""
    _say(f"{plural(len(files), 'file')}, {plural(len(all_parts), 'part')}{before}")
    records: list[PartRecord] = []
    if unfinished := [part for part in all_parts if part.number not in finished]:
        weights = next((record.weights for record in finished.values()), None)
        # Actors have another working directory.
        config = ActorConfig(source.model.resolved(), output, defaults, weights)
        for record in cluster.score(unfinished, config, pool):
            records.append(record)
            if record.weights != records[0].weights:  # fail before more parts are scored
                name = source.model.model_name_or_path
                raise FailedError(f"the nodes hold different models as {name}: make them the same, --overwrite")
        # Without the time to start Ray and to load the model.
        _say(totals(records).speed(max(r.ended for r in records) - min(r.started for r in records)))
    else:
        _say("nothing to do: every part is finished")
    total, bad = output.close([*finished.values(), *records]), f"{folder}/bad-*.jsonl"
    for line in total.losses(bad):
        _say(line)
    _say(f"{folder}: {plural(total.rows, 'row')}, {total.bad} bad, {plural(total.documents, 'document')}")
    if total.rows and total.bad == total.rows:
        raise InputError(f"not one of {total.rows} rows could be used; see {bad}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
