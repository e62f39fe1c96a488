"""An evaluation: rerank the candidates of judged queries, and measure before and after."""

from __future__ import annotations

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
from reranker.evaluate.outputs import check_outputs
from reranker.rankers.ranker import Ranker
from reranker.rankers.source import Source, open_ranker
from reranker.terminal import meter, note, plural
from reranker.types import RerankRequest


@dataclass(frozen=True, slots=True)
class Job:
    """An evaluation as the user describes it."""

    paths: Paths
    run: Path | None = None
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
    def inputs(self) -> list[Path]:
        """The files that are read, corpus and queries first."""
        return [self.paths.corpus, self.paths.queries, self.paths.qrels, *([self.run] if self.run else [])]


@dataclass(frozen=True, slots=True)
class Data:
    """Everything that is read: judgements, texts of judged queries and of candidates, and the candidates."""

    grades: Grades
    queries: dict[str, str]
    corpus: dict[str, str]
    candidates: Ranking


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
    check_outputs({"--per-query": job.per_query, "--plot": job.plot, "--save-run": job.save_run}, job.inputs)
    if job.plot:
        gain.check_plot(job.plot)
    data = _read(job)
    ranker = open_ranker(source)
    start = time.monotonic()
    ranking = _rerank(ranker, data, job.instruction)
    facts = {
        "queries": len(data.grades),
        "without_candidates": sum(not data.candidates.get(query) for query in data.grades),
        "documents": sum(map(len, data.candidates.values())),
        "first_stage": str(job.run or "bm25"),
        "seconds": round(time.monotonic() - start, 1),
    }
    return Report(facts, gain.measure(measures, data.grades, data.candidates, ranking), ranking)


def write_files(job: Job, report: Report) -> None:
    """Write the output files of a job.

    Raises:
        FailedError: one cannot be written.
    """
    if job.per_query:
        gain.write_per_query(Path(job.per_query), report.gains)
    if job.plot:
        gain.write_plot(Path(job.plot), report.gains[0])
    if job.save_run:
        judgements.write_run(Path(job.save_run), report.ranking)


def _read(job: Job) -> Data:
    """Read the data.

    Raises:
        InputError: a part is missing, or an id has no text.
    """
    paths = job.paths
    grades = judgements.read_grades(paths.qrels, job.encoding)
    queries = read_texts(paths.queries, job.kind, job.encoding, None)
    _require_texts(grades, queries, paths.queries, "query")
    queries = {query: text for query, text in queries.items() if query in grades}
    judged = dict.fromkeys(chain(*grades.values()))
    if job.run is None:
        corpus = read_texts(paths.corpus, job.kind, job.encoding, None)
        ranking = bm25.candidates(corpus, queries, job.candidates)
    else:
        run = judgements.read_run(job.run, job.encoding, grades)
        ranking = {query: documents[: job.candidates] for query, documents in run.items()}
        if not ranking:
            raise InputError(f"{job.run} ranks no query of {paths.qrels}")
        wanted = dict.fromkeys(chain(*ranking.values()))
        corpus = read_texts(paths.corpus, job.kind, job.encoding, wanted | judged)
        _require_texts(wanted, corpus, paths.corpus, "document")
    _check_judged(judged, corpus, paths.corpus)
    return Data(grades, queries, corpus, ranking)


def _require_texts(ids: Collection[str], texts: Mapping[str, str], path: Path, noun: str) -> None:
    missing = [name for name in ids if name not in texts]
    if missing:
        own = f"; its own first id is {next(iter(texts))!r}" if texts and len(missing) == len(ids) else ""
        raise InputError(
            f"{path} has no text for {len(missing)} of {len(ids)}, the first is {noun} {missing[0]!r}{own}"
        )


def _check_judged(judged: Collection[str], corpus: Mapping[str, str], path: Path) -> None:
    """Note the judged documents that the corpus lacks, which count as not found.

    Raises:
        InputError: it lacks all of them.
    """
    missing = [name for name in judged if name not in corpus]
    if len(missing) == len(judged):
        _require_texts(judged, corpus, path, "judged document")
    if missing:
        note(
            f"{path} lacks {len(missing)} of {plural(len(judged), 'judged document')}, the first is {missing[0]!r}; "
            f"relevant ones among them count as not found"
        )


def _rerank(ranker: Ranker, data: Data, instruction: str | None) -> Ranking:
    lists = {query: data.candidates[query] for query in data.queries if data.candidates.get(query)}
    requests = (
        RerankRequest(data.queries[query], [data.corpus[name] for name in names], instruction)
        for query, names in lists.items()
    )
    ranking: Ranking = {}
    with meter(sum(map(len, lists.values()))) as progress:
        for (query, names), outcome in zip(lists.items(), ranker.rank_many(requests), strict=True):
            if isinstance(outcome, RerankError):
                raise FailedError(f"query {query}: {outcome}")
            ranking[query] = [names[i] for i in outcome.best(None)]
            progress.advance(progress.done + len(names), len(names))
    return ranking
