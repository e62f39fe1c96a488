"""An evaluation: rerank the candidates of judged queries, and measure before and after."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from reranker.errors import FailedError, InputError, RerankError
from reranker.evaluate import bm25, gain, judgements
from reranker.evaluate.collection import Paths, read_texts
from reranker.evaluate.judgements import Grades, Ranking
from reranker.rankers.ranker import Ranker
from reranker.rankers.source import Source, open_ranker
from reranker.terminal import meter, note, plural
from reranker.types import RerankRequest


@dataclass(frozen=True, slots=True)
class Job:
    """An evaluation as the user describes it."""

    paths: Paths
    run: str | None = None
    """TREC run with the candidates; None: BM25 finds them."""
    kind: str | None = None
    """Form of corpus and queries, where their names do not tell it."""
    encoding: str | None = None
    """None: UTF-8."""
    candidates: int = 100
    """Max candidates per query."""
    measures: str | None = None
    """Names of ir-measures; None: the default ones."""
    instruction: str | None = None
    per_query: str | None = None
    plot: str | None = None
    save_run: str | None = None

    @property
    def inputs(self) -> list[str]:
        """The files that are read, corpus and queries first."""
        paths = self.paths
        return [*map(str, (paths.corpus, paths.queries, paths.qrels)), *([self.run] if self.run else [])]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an evaluation."""

    facts: dict[str, Any]
    gains: list[gain.Gain]
    ranking: Ranking
    """The candidates after reranking."""


def evaluate(job: Job, source: Source) -> Report:
    """Check the files, read the data, rerank the candidates and measure.

    Raises:
        InputError: the data cannot be read, or does not fit together; or an output would replace a file.
        FailedError: scoring failed, or an output cannot be written.
    """
    default = f"nDCG@10 RR@10 R@10 R@{job.candidates}"
    measures = gain.parse_measures(default if job.measures is None else job.measures)
    _check_outputs(job)
    grades, before, requests = _read(job)
    ranker = open_ranker(source)
    start = time.monotonic()
    after = _rerank(ranker, before, requests)
    facts = {
        "queries": len(grades),
        "without_candidates": sum(not before.get(query) for query in grades),
        "documents": sum(map(len, before.values())),
        "first_stage": job.run or "bm25",
        "seconds": round(time.monotonic() - start, 1),
    }
    return Report(facts, gain.measure(measures, grades, before, after), after)


def write_files(job: Job, report: Report) -> None:
    """Write the output files of a job; see `writing` for errors."""
    if job.per_query:
        gain.write_per_query(Path(job.per_query), report.gains)
    if job.plot:
        gain.write_plot(Path(job.plot), report.gains[0])
    if job.save_run:
        judgements.write_run(Path(job.save_run), report.ranking)


def _check_outputs(job: Job) -> None:
    """Refuse outputs that would replace an input or one another, or that cannot be written.

    Before the model is loaded, so that a bad name does not lose the scores.
    """
    taken = {_identity(Path(path)): f"the input {path}" for path in job.inputs}
    for option, name in {"--per-query": job.per_query, "--plot": job.plot, "--save-run": job.save_run}.items():
        if name is None:
            continue
        path = Path(name)
        if not name or path.is_dir():
            raise InputError(f"{option}={name!r} names no file")
        if not path.parent.is_dir():
            raise InputError(f"{option}={name}: the folder {path.parent} does not exist")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise FailedError(f"cannot write {name} ({option}): Permission denied")
        if path.exists() and not path.is_file():  # a device or a pipe has no content to replace
            continue
        if other := taken.get(_identity(path)):
            raise InputError(f"{option}={name} would replace {other}; name another file")
        taken[_identity(path)] = f"the output of {option}"
    if job.plot:
        gain.check_plot(job.plot)


def _identity(path: Path) -> object:
    """Return the same value for all names of a file, symbolic and hard links included."""
    try:
        status = path.stat()
    except OSError:
        return path.resolve()
    return status.st_dev, status.st_ino


def _read(job: Job) -> tuple[Grades, Ranking, dict[str, RerankRequest]]:
    """Return the judgements, the candidates, and the request of each query that has candidates."""
    paths = job.paths
    grades = judgements.read_grades(paths.qrels, job.encoding)
    queries = read_texts(paths.queries, job.kind, job.encoding, None)
    _require_texts(grades, queries, paths.queries, "query")
    queries = {query: text for query, text in queries.items() if query in grades}
    judged = dict.fromkeys(chain(*grades.values()))
    ranking: Ranking = {}
    if job.run:
        run = judgements.read_run(Path(job.run), job.encoding, grades)
        ranking = {query: documents[: job.candidates] for query, documents in run.items()}
        if not ranking:
            raise InputError(f"{job.run} ranks no query of {paths.qrels}")
    wanted = dict.fromkeys(chain(*ranking.values()))
    corpus = read_texts(paths.corpus, job.kind, job.encoding, wanted | judged if job.run else None)
    _require_texts(wanted, corpus, paths.corpus, "document")
    _check_judged(judged, corpus, paths.corpus)
    ranking = ranking or bm25.candidates(corpus, queries, job.candidates)
    requests = {
        query: RerankRequest(text, [corpus[name] for name in ranking[query]], job.instruction)
        for query, text in queries.items()
        if ranking.get(query)
    }
    return grades, ranking, requests


def _require_texts(ids: Collection[str], texts: Mapping[str, str], path: Path, noun: str) -> None:
    missing = [name for name in ids if name not in texts]
    if missing:
        own = f"; its own first id is {next(iter(texts))!r}" if texts and len(missing) == len(ids) else ""
        raise InputError(
            f"{path} has no text for {len(missing)} of {len(ids)}, the first is {noun} {missing[0]!r}{own}"
        )


def _check_judged(judged: Collection[str], corpus: Mapping[str, str], path: Path) -> None:
    """Note the judged documents that the corpus lacks, which count as not found; refuse a corpus without any."""
    missing = [name for name in judged if name not in corpus]
    if len(missing) == len(judged):
        _require_texts(judged, corpus, path, "judged document")
    if missing:
        note(
            f"{path} lacks {len(missing)} of {plural(len(judged), 'judged document')}, the first is {missing[0]!r}; "
            f"relevant ones among them count as not found"
        )


def _rerank(ranker: Ranker, before: Ranking, requests: Mapping[str, RerankRequest]) -> Ranking:
    after: Ranking = {}
    with meter(sum(len(request.documents) for request in requests.values())) as progress:
        for query, outcome in zip(requests, ranker.rank_many(requests.values()), strict=True):
            if isinstance(outcome, RerankError):
                raise FailedError(f"query {query}: {outcome}")
            after[query] = [before[query][i] for i in outcome.best(None)]
            progress.advance(progress.done + len(outcome.scores), len(outcome.scores))
    return after
