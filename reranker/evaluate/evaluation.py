"""An evaluation: rerank the candidates of judged queries, and compare the systems that did."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from reranker.errors import FailedError, InputError, RerankError
from reranker.evaluate.bm25 import candidates
from reranker.evaluate.collection import Paths, read_texts
from reranker.evaluate.comparison import Report, Result, examples
from reranker.evaluate.files import check_plot, write_per_query, write_plot
from reranker.evaluate.judgements import Grades, Ranking, read_grades, read_run, write_run
from reranker.evaluate.measures import measure, parse_measures
from reranker.rankers.ranker import Ranker
from reranker.rankers.source import Source, open_ranker
from reranker.terminal import meter, note, plural, truncated, waiting
from reranker.types import RerankRequest

_BM25 = "bm25"


@dataclass(frozen=True, slots=True)
class System:
    """What is compared: a model or service with an instruction, or a saved run."""

    source: Source | None = None
    """None: a saved run."""
    instruction: str | None = None
    """None: the model's default."""
    run: str | None = None
    """TREC run, compared as it is."""


@dataclass(frozen=True, slots=True)
class Job:
    """The data of an evaluation, and its output files."""

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
    data: str = ""
    """Name of the data set in the report; empty: that of the file of judgements."""
    examples: int = 3
    """Max winners, and losers, in the report."""
    per_query: str | None = None
    plot: str | None = None
    save_run: str | None = None
    """With several rerankers each has a file: its number is put before the suffix."""
    overwrite: bool = False
    """Whether outputs may replace files of earlier runs."""

    @property
    def inputs(self) -> list[str]:
        """The files that are read, corpus and queries first."""
        paths = self.paths
        return [*map(str, (paths.corpus, paths.queries, paths.qrels)), *([self.run] if self.run else [])]


@dataclass(frozen=True, slots=True)
class _Data:
    grades: Grades
    queries: dict[str, str]
    """Texts of the judged queries."""
    corpus: dict[str, str]
    """Texts of the documents that are reranked or shown."""
    first: Ranking
    """Candidates; empty if no first stage is needed."""
    runs: list[Ranking]
    """The saved runs, in the order of the systems."""


def evaluate(job: Job, systems: Sequence[System]) -> Report:
    """Check the files, read the data, rerank the candidates with every system that is no saved run, and compare.

    With one system the reference is the first stage, else the first system. Systems with the same source that follow
    one another share its model; a model is released before the next one is loaded.

    Raises:
        InputError: the data cannot be read, or does not fit together; or an output exists
            and `job.overwrite` is not set.
        ModelLoadError: a model cannot be served.
        FailedError: scoring failed, or an output cannot be written.
    """
    default = f"nDCG@10 RR@10 R@10 R@{job.candidates}"
    measures = parse_measures(default if job.measures is None else job.measures)
    _check_systems(job, systems)
    _check_outputs(job, systems)
    with waiting("reading the data"):
        data = _read(job, systems)
    results, runs = [], iter(data.runs)
    first_stage = job.run or _BM25 if data.first else None
    if first_stage:
        results.append(Result(first_stage, data.first, measure(measures, data.grades, data.first), _facts(run=job.run)))
    instructions = list(dict.fromkeys(s.instruction for s in systems if s.source))
    for source, group in groupby(systems, key=lambda system: system.source):
        if source is None:
            for system, ranking in zip(group, runs, strict=False):
                facts = _facts(run=system.run)
                results.append(Result(str(system.run), ranking, measure(measures, data.grades, ranking), facts))
            continue
        ranker = open_ranker(source)
        for system in group:
            name, facts = _identify(ranker, system, instructions)
            ranking, cost = _rerank(ranker, data, system, name)
            results.append(Result(name, ranking, measure(measures, data.grades, ranking), facts | cost))
        del ranker
        gc.collect()  # the next model needs this one's memory
    facts = {
        "data": job.data or str(job.paths.qrels),
        "queries": len(data.grades),
        "without_candidates": sum(not data.first.get(query) for query in data.grades) if first_stage else None,
        "documents": sum(map(len, data.first.values())),
        "first_stage": first_stage,
    }
    results = _distinct(results)
    reference = results[1 if first_stage and len(systems) > 1 else 0].name
    report = Report(facts, results, reference)
    return replace(report, examples=examples(report, data.queries, data.corpus, job.examples))


def write_files(job: Job, report: Report) -> None:
    """Write the output files of a job; see `writing` for errors."""
    if job.per_query:
        write_per_query(Path(job.per_query), report)
    if job.plot:
        write_plot(Path(job.plot), report)
    if job.save_run:
        reranked = [result for result in report.results if "seconds" in result.facts]
        for path, result in zip(_run_names(job.save_run, len(reranked)), reranked, strict=True):
            write_run(
                Path(path), result.ranking, f"{result.name} {result.facts['instruction'] or ''} {report.facts['data']}"
            )


def _run_names(name: str, count: int) -> list[str]:
    path = Path(name)
    if count == 1 or not path.name:
        return [name]
    return [str(path.with_stem(f"{path.stem}-{i}")) for i in range(1, count + 1)]


def _facts(
    model: str | None = None, url: str | None = None, instruction: str | None = None, run: str | None = None
) -> dict[str, Any]:
    return {"model": model, "url": url, "instruction": instruction, "run": run}


def _identify(ranker: Ranker, system: System, instructions: Sequence[str | None]) -> tuple[str, dict[str, Any]]:
    """Return the name of a system, numbered by instruction if there are several, and its facts."""
    known, source = ranker.facts, system.source
    model, url = known.get("model"), known.get("url")
    instruction = system.instruction
    if instruction is None and source and not url:
        instruction = source.model.default_instruction or None
    name = f"{model} ({url})" if model and url else model or url or "model"
    if len(instructions) > 1:
        name += f" [{instructions.index(system.instruction) + 1}]"
    return name, _facts(model, url, instruction)


def _distinct(results: Sequence[Result]) -> list[Result]:
    """Number the later results of one name, such as the same model with other weights in the same folder."""
    names: list[str] = []
    for result in results:
        number, name = 2, result.name
        while name in names:
            name, number = f"{result.name} ({number})", number + 1
        names.append(name)
    return [replace(result, name=name) for result, name in zip(results, names, strict=True)]


def _check_systems(job: Job, systems: Sequence[System]) -> None:
    if not systems:
        raise InputError("there is nothing to evaluate: name a model, a service or a saved run")
    runs = [system.run for system in systems if system.source is None]
    if "" in runs or None in runs:
        raise InputError("--compare='' names no file")
    if twice := next((name for name in runs if runs.count(name) > 1), None):
        raise InputError(f"--compare={twice} is given twice")
    if len(runs) < len(systems):
        return
    if len(runs) == 1 and not job.run:
        raise InputError(f"{runs[0]} has nothing to be compared with: add --compare, --run or --model")
    if job.save_run:
        raise InputError("--save-run has no effect: --compare alone reranks nothing; add --model or --url")


def _check_outputs(job: Job, systems: Sequence[System]) -> None:
    """Refuse outputs that would replace an input, one another or an earlier run's, or that cannot be written.

    Before the model is loaded, so that a bad name does not lose the scores.
    """
    inputs = [*job.inputs, *(system.run for system in systems if system.run)]
    taken = {_identity(Path(path)): f"the input {path}" for path in inputs}
    for option, name in _outputs(job, systems):
        path = Path(name)
        if not name or path.is_dir():
            raise InputError(f"{option}={name!r} names no file")
        if not path.parent.is_dir():
            raise InputError(f"{option}={name}: the folder {path.parent} does not exist")
        if path.suffix.lower() == ".gz":
            raise InputError(f"{option}={name}: outputs are not compressed; leave out {path.suffix}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise FailedError(f"cannot write {name} ({option}): Permission denied")
        if path.exists() and not path.is_file():  # a device or a pipe has no content to replace
            continue
        if other := taken.get(_identity(path)):
            raise InputError(f"{option}={name} would replace {other}; name another file")
        if path.exists() and not job.overwrite:
            raise InputError(f"{option}={name} exists already; give another name, or --overwrite")
        taken[_identity(path)] = f"the output of {option}"
    if job.plot:
        check_plot(job.plot)


def _outputs(job: Job, systems: Sequence[System]) -> Iterator[tuple[str, str]]:
    """Yield option and name of every file that will be written."""
    plot = job.plot
    if plot and Path(plot).name and not Path(plot).suffix and not Path(plot).is_dir():
        plot += ".png"  # matplotlib adds it
    for option, name in {"--per-query": job.per_query, "--plot": plot}.items():
        if name is not None:
            yield option, name
    if job.save_run is not None:
        reranked = sum(system.source is not None for system in systems)
        yield from (("--save-run", name) for name in _run_names(job.save_run, reranked))


def _identity(path: Path) -> object:
    """Return the same value for all names of a file, symbolic and hard links included."""
    try:
        status = path.stat()
    except OSError:
        return path.resolve()
    return status.st_dev, status.st_ino


def _read(job: Job, systems: Sequence[System]) -> _Data:
    """Return judgements, texts, candidates and saved runs; candidates only where something reranks them."""
    paths = job.paths
    grades = read_grades(paths.qrels, job.encoding)
    queries = read_texts(paths.queries, job.kind, job.encoding, None)
    _require_texts(grades, queries, paths.queries, "query")
    queries = {query: text for query, text in queries.items() if query in grades}
    judged = dict.fromkeys(chain(*grades.values()))
    names = [system.run for system in systems if system.run]
    runs = [_read_run(job, name, grades) for name in names]
    for name, ranking in zip(names, runs, strict=True):
        _note_absent(name, ranking, grades)
    first: Ranking = {}
    if job.run:
        full = _read_run(job, job.run, grades)
        first = {query: dict(islice(found.items(), job.candidates)) for query, found in full.items()}
    wanted = dict.fromkeys(chain(*first.values()))
    by_bm25 = not job.run and any(system.source for system in systems)
    shown = dict.fromkeys(chain(*(islice(found, 1) for run in runs for found in run.values())))
    corpus = read_texts(paths.corpus, job.kind, job.encoding, None if by_bm25 else wanted | judged | shown)
    _require_texts(wanted, corpus, paths.corpus, "document")
    _check_judged(judged, corpus, paths.corpus)
    if by_bm25:
        first = candidates(corpus, queries, job.candidates)
    if job.save_run is not None:
        _require_words(chain(first, *first.values()), "--save-run")
    return _Data(grades, queries, corpus, first, runs)


def _read_run(job: Job, name: str, grades: Grades) -> Ranking:
    ranking = read_run(Path(name), job.encoding, grades)
    if not ranking:
        raise InputError(f"{name} ranks no query of {job.paths.qrels}")
    if not any(grades[query].keys() & found.keys() for query, found in ranking.items()):
        note(f"{name} ranks no judged document; are its ids those of {job.paths.qrels}?")
    return ranking


def _note_absent(name: str, ranking: Ranking, grades: Grades) -> None:
    """Note the judged queries that a saved run lacks: an unfinished run looks like a bad one."""
    if absent := [query for query in grades if query not in ranking]:
        count = f"{len(absent)} of {plural(len(grades), 'judged query', 'judged queries')}"
        note(f"{name} ranks nothing for {count}, the first is {absent[0]!r}; each counts as 0")


def _require_texts(ids: Collection[str], texts: Mapping[str, str], path: Path, noun: str) -> None:
    missing = [name for name in ids if name not in texts]
    if missing:
        own = f"; its own first id is {next(iter(texts))!r}" if texts and len(missing) == len(ids) else ""
        raise InputError(
            f"{path} has no text for {len(missing)} of {len(ids)}, the first is {noun} {missing[0]!r}{own}"
        )


def _require_words(ids: Iterable[str], option: str) -> None:
    """Refuse ids that a TREC run, whose columns are separated by blanks, cannot hold."""
    if (name := next((name for name in ids if name.split() != [name]), None)) is not None:
        raise InputError(f"{option}: the id {name!r} has a blank, which a TREC run cannot hold; rename it")


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


def _rerank(ranker: Ranker, data: _Data, system: System, name: str) -> tuple[Ranking, dict[str, Any]]:
    """Return the reranked candidates, and what that took."""
    requests = {
        query: RerankRequest(text, [data.corpus[document] for document in data.first[query]], system.instruction)
        for query, text in data.queries.items()
        if data.first.get(query)
    }
    ranking: Ranking = {}
    cut, start = 0, time.monotonic()
    with meter(sum(len(request.documents) for request in requests.values())) as progress:
        try:
            for query, outcome in zip(requests, ranker.rank_many(requests.values()), strict=True):
                if isinstance(outcome, RerankError):
                    raise FailedError(f"{name}, query {query}: {outcome}")
                documents = list(data.first[query])
                ranking[query] = {documents[i]: outcome.scores[i] for i in outcome.best(None)}
                cut += outcome.truncated
                progress.advance(progress.done + len(outcome.scores), len(outcome.scores))
        except (FailedError, KeyboardInterrupt):
            count = plural(len(requests), "query", "queries")
            progress.say(f"{name}: {len(ranking)} of {count} scored; nothing is kept, the next run starts anew")
            raise
    if cut:
        note(f"{name}: {truncated(cut, system.source.url if system.source else None)}")
    return ranking, {"seconds": round(time.monotonic() - start, 1), "truncated": cut}
