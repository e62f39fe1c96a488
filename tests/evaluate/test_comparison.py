"""Several systems in one table: models, instructions, services and saved runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reranker.errors import InputError
from reranker.evaluate import Job, Paths, Source, System, compare, evaluate
from reranker.settings import ModelSettings
from tests.cli.command import cli, stub
from tests.cli.test_rank import FAKE, url
from tests.conftest import Server, Start
from tests.evaluate.test_evaluation import RUN_FILE, beir, trec

GRADES = {"1": {"a": 1}, "2": {"b": 1}, "3": {"c": 1}}
GOOD = {"1": {"a": 0.9, "b": 0.1}, "2": {"a": 0.1, "b": 0.2}, "3": {"c": 0.5}}
BAD = {"1": {"a": 0.1, "b": 0.9}, "2": {"a": 0.2, "b": 0.1}}


@pytest.fixture(scope="module")
def service(start: Start) -> Server:
    return start(command=FAKE)


def means(report: dict[str, Any], measure: str) -> dict[str, float]:
    return {system["name"]: system["measures"][measure]["mean"] for system in report["systems"]}


def test_rankings_in_memory() -> None:
    report = compare(GRADES, {"good": GOOD, "bad": BAD}, "rr p@1")
    assert (report.measures, report.reference, [r.name for r in report.others]) == (["RR", "P@1"], "good", ["bad"])
    assert [result.mean("RR") for result in report.results] == pytest.approx([1, 1 / 3])
    change = report.differences["P@1", "bad"]
    assert (change.mean, change.better, change.equal, change.worse, change.p) == (-1, 0, 0, 3, 0.25)
    assert compare(GRADES, {"good": GOOD, "bad": BAD}, "rr", "bad").differences["RR", "good"].better == 3
    with pytest.raises(KeyError):
        compare(GRADES, {"good": GOOD}, "rr", "bad")


def test_instructions_are_compared_through_a_service(service: Server, tmp_path: Path) -> None:
    args = [*trec(tmp_path), "--instruction", "", "--instruction", "find $animals$ 动物", "--url", url(service)]
    files = ["--save-run", "new.txt", "--plot", "p.svg"]
    done = cli("evaluate", *args, *files, "--concurrency", 2, cwd=tmp_path)
    report = json.loads(done.stdout)
    names = [f"fake ({url(service)}) [1]", f"fake ({url(service)}) [2]"]
    assert [system["name"] for system in report["systems"]] == [RUN_FILE, *names]
    assert [system["instruction"] for system in report["systems"]] == [None, None, "find $animals$ 动物"]
    assert report["reference"] == names[0]
    assert report["systems"][0]["measures"]["MRR@10"]["difference"]["worse"] == 2
    for number, tail in ((1, ["[1]", "qrels.txt"]), (2, ["[2]", "find", "$animals$", "动物", "qrels.txt"])):
        tags = {line.split()[5] for line in (tmp_path / f"new-{number}.txt").read_text().splitlines()}
        assert tags == {"_".join(["fake", f"({url(service)})", *tail])}
    assert not (tmp_path / "new.txt").exists()
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    assert "p.svg: the font of the picture lacks some characters" in done.stderr


def test_a_saved_run_has_the_values_of_the_model_that_wrote_it(model_path: Path, tmp_path: Path) -> None:
    args = trec(tmp_path)
    models = ["--model", model_path, "--model", "", "--device", "cpu"]
    first = json.loads(cli("evaluate", *args, *models, "--save-run", "r.txt", cwd=tmp_path).stdout)
    names = [system["name"] for system in first["systems"]]
    assert names == [RUN_FILE, str(model_path), "demo"]
    again = cli("evaluate", *args, "--compare", "r-1.txt", "--compare", "r-2.txt", cwd=tmp_path)
    assert "loading" not in again.stderr
    second = json.loads(again.stdout)
    assert second["reference"] == "r-1.txt"
    for measure in ("nDCG@10", "MRR@10", "R@10"):
        assert list(means(second, measure).values()) == list(means(first, measure).values())
    for old, new in zip(first["systems"], second["systems"], strict=True):
        assert old["measures"] == new["measures"]


def test_saved_runs_alone_need_no_first_stage_and_come_before_models(service: Server, tmp_path: Path) -> None:
    args = trec(tmp_path)[:-2]
    report = json.loads(cli("evaluate", *args, "--compare", RUN_FILE, "--url", url(service), cwd=tmp_path).stdout)
    assert [system["run"] for system in report["systems"]] == [None, RUN_FILE, None]
    assert (report["first_stage"], report["reference"]) == ("bm25", RUN_FILE)
    (tmp_path / "other.txt").write_text("q1 Q0 d3 1 0.5 x\nq1 Q0 z9 2 0.4 x\n")
    two = cli("evaluate", *args, "--compare", RUN_FILE, "--compare", "other.txt", cwd=tmp_path)
    report = json.loads(two.stdout)
    assert (report["first_stage"], list(means(report, "MRR@10"))) == (None, [RUN_FILE, "other.txt"])
    assert means(report, "MRR@10")["other.txt"] == pytest.approx(1 / 3)


def test_markdown_is_a_table_that_names_everything(service: Server, tmp_path: Path) -> None:
    beir(tmp_path)
    (tmp_path / "old|run.txt").write_text("q1 Q0 d0 1 0.5 x\n")
    args = ("--beir", ".", "--compare", "old|run.txt", "--instruction", "find", "--url", url(service))
    out = cli("evaluate", *args, "--output", "markdown", "--measures", "rr", cwd=tmp_path).stdout
    lines = out.splitlines()
    assert lines[:2] == [
        "| measure | system | mean | difference | 95 % interval | p | better | equal | worse |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    assert lines[3] == r"| RR | old\|run.txt | 0.0000 | reference |  |  |  |  |  |"
    assert lines[4].startswith(f"| RR | fake ({url(service)}) | 0.6667 | +0.6667 |")
    assert any(line.startswith(f"data {tmp_path.name}/test: 3 queries".replace("_", r"\_")) for line in lines)
    assert any(line.startswith(f"fake ({url(service)}): instruction: find, ") for line in lines)
    assert (
        rf"| +1.0000 | q1 red fox jumps | d0 nothing nothing here | fake ({url(service)}): d3 red red fox jumps |"
        in out
    )


def test_the_table_shows_winners_and_losers_with_their_texts(service: Server, tmp_path: Path) -> None:
    args = [*trec(tmp_path), "--measures", "rr", "--output", "table"]
    (tmp_path / "new.txt").write_text("q1 Q0 d3 1 0.5 x\nq2 Q0 e1 1 0.5 x\n")
    name = f"fake ({url(service)})"
    out = cli("evaluate", *args, "--url", url(service), "--compare", "new.txt", cwd=tmp_path).stdout
    assert f"+1.0000 RR  query q2 blue sea\n  new.txt: e1 sand\n  {name}: e0 blue sea\n" in out
    out = cli("evaluate", *args, "--compare", "new.txt", "--examples", 1, cwd=tmp_path).stdout
    shown = [line.split()[0] for line in out.splitlines() if " query " in line]
    assert shown == ["+0.6667", "-0.5000"]
    out = cli("evaluate", *args, "--compare", "new.txt", "--examples", 0, cwd=tmp_path).stdout
    assert " query " not in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--compare", "run.txt"], "run.txt has nothing to be compared with: add --compare, --run or --model"),
        (["--compare", "run.txt", "--compare", "run.txt"], "--compare=run.txt is given twice"),
        (["--compare", ""], "--compare='' names no file"),
        (["--compare", "none.txt", "--url", "http://127.0.0.1:9"], "cannot read none.txt: No such file"),
        (["--compare", "run.txt", "--run", "run.txt", "--save-run", "x"], "--save-run has no effect"),
        (["--compare", "run.txt", "--url", "http://h", "--per-query", "run.txt"], "would replace the input run.txt"),
        (["--url", "http://h", "--url", "http://h"], "--url=http://h is given twice"),
        (["--model", "a", "--url", "http://h"], "--model has no effect with --url"),
        (["--instruction", "a", "--instruction", "a"], "--instruction=a is given twice"),
        (["--compare", "run.txt", "--token", "t"], "--token is for a running service"),
        (["--concurrency", "2"], "--concurrency is for a running service; give its address with --url"),
        (["--concurrency", "65", "--url", "http://h"], "'65' is not a whole number from 1 to 64"),
        (["--examples", "-1"], "--examples"),
        (
            ["--instruction", "a", "--instruction", "b", "--url", "http://h", "--save-run", "x", "--plot", "x-2.png"],
            "cannot reach",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_compared_is_one_line(args: list[str], says: str, tmp_path: Path) -> None:
    code = 1 if says == "cannot reach" else 2
    given = [word.replace("http://h", "http://127.0.0.1:9") for word in args]
    err = cli("evaluate", *trec(tmp_path)[:-2], *given, cwd=tmp_path, code=code).stderr
    assert says.replace("http://h", "http://127.0.0.1:9") in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1


def test_a_numbered_run_that_is_another_output_is_refused(tmp_path: Path) -> None:
    args = ["--instruction", "a", "--instruction", "b", "--save-run", "x.csv", "--per-query", "x-2.csv"]
    err = cli("evaluate", *trec(tmp_path), *args, "--url", "http://127.0.0.1:9", cwd=tmp_path, code=2).stderr
    assert err == "error: --save-run=x-2.csv would replace the output of --per-query; name another file\n"


def test_a_run_of_other_documents_is_said(tmp_path: Path) -> None:
    args = trec(tmp_path)
    (tmp_path / "other.txt").write_text("q1 Q0 doc7 1 0.5 x\n")
    done = cli("evaluate", *args, "--compare", "other.txt", cwd=tmp_path)
    assert "note: other.txt ranks no judged document; are its ids those of qrels.txt?\n" in done.stderr
    assert means(json.loads(done.stdout), "R@10")["other.txt"] == 0
    assert (
        "note: other.txt ranks nothing for 2 of 3 judged queries, the first is 'q2'; each counts as 0\n" in done.stderr
    )


def test_the_function_with_a_local_model_and_with_a_service(service: Server, tmp_path: Path) -> None:
    trec(tmp_path)
    paths = Paths(*(tmp_path / name for name in ("corpus.tsv", "queries.tsv", "qrels.txt")))
    job = Job(paths, run=str(tmp_path / RUN_FILE), measures="rr@10", examples=1)
    local = System(Source(model=ModelSettings(model_device="cpu")))
    report = evaluate(job, [local, System(Source(url(service)))])
    assert [result.facts["model"] for result in report.results] == [None, "demo", "fake"]
    assert report.reference == "demo"
    assert report.results[2].mean("MRR@10") == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(job, [])


def test_a_service_without_a_name_is_called_by_its_address(tmp_path: Path) -> None:
    with stub() as other:
        report = json.loads(cli("evaluate", *trec(tmp_path), "--url", other.url, cwd=tmp_path).stdout)
    assert (report["systems"][1]["name"], report["systems"][1]["model"]) == (other.url, None)


def test_each_system_gets_a_verdict_by_the_first_measure() -> None:
    grades = {f"q{i}": {"right": 1} for i in range(24)}

    def run(right: int) -> dict[str, dict[str, float]]:
        """The right document is first for so many queries, and second for the others."""
        return {f"q{i}": {"right": 1.0, "wrong": 0.0 if i < right else 2.0} for i in range(24)}

    runs = {"base": run(8), "better": run(24), "worse": run(0), "same": run(9)}
    report = compare(grades, runs, "rr")
    assert report.verdicts[0].startswith("better: better than base by RR: +0.3333, p 0.000")
    assert report.verdicts[0].endswith(" < 0.01667")  # 0.05 / 3
    assert report.verdicts[1].startswith("worse: worse than base by RR: -0.1667, p 0.0")
    no_difference = "same: no difference to base is shown by RR (p 1.0000, not below 0.01667): judge more queries"
    assert report.verdicts[2] == f"{no_difference}, or take the cheaper"
    assert report.json()["verdicts"] == report.verdicts


def test_few_queries_are_said() -> None:
    grades = {query: {"right": 1} for query in ("a", "b")}
    first, second = ({query: {"right": 1.0, "wrong": wrong} for query in grades} for wrong in (0.0, 2.0))
    runs = {"x": first, "y": second}
    assert compare(grades, runs, "rr").verdicts[0].endswith("; 2 queries are few, the interval is too narrow")
    one = compare({"a": grades["a"]}, runs, "rr").verdicts
    no_difference = "y: no difference to x is shown by RR (one query proves nothing)"
    assert one == [f"{no_difference}: judge more queries, or take the cheaper"]
