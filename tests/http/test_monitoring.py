"""deploy/: alerts and dashboard use only exported names, and a real Prometheus accepts them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from fastapi.routing import iter_route_contexts
from prometheus_client import values

from app import create_app
from config import Settings
from reranker.http.metrics import TABLE, Metrics
from tests.conftest import GUNICORN, ROOT, Start, free_port
from tests.fake import FakeScorer

DEPLOY = ROOT / "deploy"
FAKE = [*GUNICORN[:-1], "tests.fake_app:app"]
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "reranker.json").read_text())
FILES = ["docker-compose.yml", "docker-compose.cpu.yml"]


def tool(name: str) -> str:
    """Return the path of a program of Debian's package prometheus."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here (Debian: package prometheus)")
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[tuple[str, str]]:
    """Return (title, expression) of every panel."""
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def marks() -> list[tuple[str, str]]:
    """Return (name, expression) of every annotation."""
    return [(one["name"], one["expr"]) for one in DASHBOARD["annotations"]["list"]]


def compose(file: str) -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())
    return result


@pytest.fixture
def exported() -> Iterator[dict[str, set[str]]]:
    """Every sample name that the service exports, with its labels."""
    before = values.ValueClass
    labels = {row.name: set(row.labels) for row in TABLE}
    result: dict[str, set[str]] = {}
    metrics = Metrics()
    metrics.loaded(FakeScorer().info, 1)  # some metrics are absent before
    for family in metrics.registry.collect():
        if family.type == "histogram":
            result |= {f"{family.name}{end}": labels[family.name] for end in ("_sum", "_count")}
            result[f"{family.name}_bucket"] = labels[family.name] | {"le"}
        else:
            result[family.name + ("_total" if family.type == "counter" else "")] = labels[family.name]
    yield result
    values.ValueClass = before


def test_alerts_and_dashboard_use_only_what_is_exported(exported: dict[str, set[str]]) -> None:
    used = {name for _, text in expressions() + marks() for name in re.findall(r"reranker_\w+", text)}
    used |= {name for rule in rules() for name in re.findall(r"reranker_\w+", rule["expr"])}
    assert used <= set(exported)
    assert len(used) > 15
    variable = DASHBOARD["templating"]["list"][0]["query"]["query"]
    assert re.findall(r"reranker_\w+", variable)[0] in exported


def test_labels_and_their_values_exist(exported: dict[str, set[str]]) -> None:
    from reranker import errors

    kinds = {kind.error_type for kind in vars(errors).values() if hasattr(kind, "error_type")}
    texts = [text for _, text in expressions() + marks()] + [rule["expr"] for rule in rules()]
    for name, selector in [pair for text in texts for pair in re.findall(r"(reranker_\w+)\{([^}]*)\}", text)]:
        for label, value in re.findall(r"(\w+)=~?\"([^\"]*)\"", selector):
            assert label in exported[name] | {"instance"}, (name, label)
            if label == "error_type":
                assert set(value.split("|")) <= kinds


@pytest.mark.usefixtures("exported")  # restores what `Metrics` sets
def test_what_counts_as_a_rerank_is_every_route_that_ranks_and_no_other() -> None:
    """Probes among them would hide errors, and fire at 503s of a load; a dialect outside would have no alert."""
    app = create_app(Settings(), FakeScorer)
    routes = {str(route.path): route.methods or set() for route in iter_route_contexts(app.routes)}
    texts = [text for _, text in expressions() + marks()] + [rule["expr"] for rule in rules()]
    found = [re.findall(r'route=~"([^"]*)"', text) for text in texts]
    [pattern] = {one for group in found for one in group}
    ranking = {path for path in routes if re.fullmatch(pattern, path)}
    assert ranking == {path for path, methods in routes.items() if "POST" in methods}
    assert len(ranking) > 10
    for text in texts:
        for selector in re.findall(r"reranker_request(?:s_total|_duration_seconds_bucket)(\{[^}]*\}|)", text):
            assert "route=~" in selector or 'status="429"' in selector, text  # a refused connection has no route


def test_the_queries_of_the_documentation_are_accepted(exported: dict[str, set[str]], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    queries = [query.replace("\\|", "|") for query in re.findall(r"`(sum[^`]*reranker_[^`]*)`", text)]
    assert len(queries) == 5
    for query in queries:
        labels = set(re.findall(r"by \((\w+)\)", query)) | set(re.findall(r'(\w+)=~?"', query))
        for name in re.findall(r"reranker_\w+", query):
            assert labels <= exported[name], query
    rules = [{"record": f"documented:query:{i}", "expr": query} for i, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "documented", "rules": rules}]}))
    command = [tool("promtool"), "check", "rules", str(tmp_path / "rules.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    [source] = yaml.safe_load((DEPLOY / "grafana" / "datasource.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_promtool_accepts_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    texts = [text for _, text in expressions() + marks()]
    rules = [
        {"record": f"panel:{i}", "expr": text.replace("$__rate_interval", "1m").replace("$instance", ".*")}
        for i, text in enumerate(texts)
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    command = [tool("promtool"), "check", "rules", str(tmp_path / "rules.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_promtool_accepts_configuration_and_alerts(tmp_path: Path) -> None:
    promtool = tool("promtool")
    (tmp_path / "token").write_text("tok")
    (tmp_path / "prometheus.yml").write_text(
        CONFIG.read_text().replace("/etc/prometheus/", f"{ALERTS.parent}/").replace("/tmp/token", f"{tmp_path}/token")
    )
    checked = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout


def test_promtool_accepts_the_configuration_for_ray(tmp_path: Path) -> None:
    """It also maps Ray's names of the metrics to those of dashboard and alerts."""
    promtool = tool("promtool")
    text = (DEPLOY / "prometheus" / "ray.yml").read_text().replace("/etc/prometheus/", f"{ALERTS.parent}/")
    (tmp_path / "ray.yml").write_text(text)
    checked = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "ray.yml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    [rule] = yaml.safe_load(text)["scrape_configs"][0]["metric_relabel_configs"]
    assert rule["source_labels"] == [rule["target_label"]] == ["__name__"]
    match = re.fullmatch(rule["regex"], "ray_reranker_queue_tokens")
    assert match is not None
    assert rule["replacement"].replace("$1", match[1]) == "reranker_queue_tokens"
    assert re.fullmatch(rule["regex"], "ray_serve_num_http_requests") is None


SCENARIOS: dict[str, tuple[dict[str, str], str]] = {
    "RerankerDown": ({'up{job="reranker"}': "0x30"}, "5m"),
    "RerankerAbsent": ({"another": "1x60"}, "7m"),
    "RerankerWorkersLost": ({"reranker_workers": "2x60", "reranker_ready_workers": "1x60"}, "12m"),
    "RerankerRestarts": ({"reranker_worker_restarts_total": "0x8 1x4 2x4 3x60"}, "10m"),
    "RerankerUnauthorized": ({'reranker_errors_total{error_type="unauthorized"}': "0+30x60"}, "12m"),
    "RerankerDemoModel": ({"reranker_demo_model_workers": "1x90"}, "17m"),
    "RerankerSelfCheckFailed": ({"reranker_self_check_failed_workers": "1x60"}, "3m"),
    "RerankerTruncates": (
        {"reranker_truncated_documents_total": "0+30x300", "reranker_documents_total": "0+100x300"},
        "45m",
    ),
    "RerankerNotReady": ({"reranker_ready_workers": "0x60"}, "12m"),
    "RerankerScoresBroken": ({'reranker_errors_total{error_type="scoring_failed"}': "0x8 1x60"}, "5m"),
    "RerankerFails": (
        {
            'reranker_requests_total{route="/v1/rerank",status="200"}': "0+98x60",
            'reranker_requests_total{route="/v1/rerank",status="504"}': "0+2x60",
        },
        "12m",
    ),
    "RerankerRefuses": (
        {
            'reranker_requests_total{route="/v1/rerank",status="200"}': "0+90x60",
            'reranker_requests_total{route="/v1/rerank",status="429"}': "0+10x60",
        },
        "12m",
    ),
    "RerankerSlow": (
        {
            'reranker_request_duration_seconds_bucket{route="/v1/rerank",le="5"}': "0+90x90",
            'reranker_request_duration_seconds_bucket{route="/v1/rerank",le="10"}': "0+100x90",
            'reranker_request_duration_seconds_bucket{route="/v1/rerank",le="+Inf"}': "0+100x90",
        },
        "20m",
    ),
    "RerankerQueues": (
        {
            'reranker_queue_wait_seconds_bucket{le="1"}': "0+50x90",
            'reranker_queue_wait_seconds_bucket{le="5"}': "0+100x90",
            'reranker_queue_wait_seconds_bucket{le="+Inf"}': "0+100x90",
        },
        "20m",
    ),
}
QUIET = {
    'up{job="reranker"}': "1x300",
    "reranker_workers": "2x300",
    "reranker_ready_workers": "2x300",
    "reranker_worker_restarts_total": "0x8 1x40 2x300",
    "reranker_start_time_seconds": "1x8 2x40 3x300",
    "reranker_demo_model_workers": "0x300",
    "reranker_self_check_failed_workers": "0x300",
    'reranker_errors_total{error_type="unauthorized"}': "0+10x300",
    "reranker_truncated_documents_total": "0+10x300",
    "reranker_documents_total": "0+100x300",
    'reranker_errors_total{error_type="scoring_failed"}': "3x300",
    'reranker_requests_total{route="/v1/rerank",status="200"}': "0+100x300",
    'reranker_requests_total{route="/readyz",status="503"}': "0+3x300",  # a load
    'reranker_requests_total{route="/v1/rerank",status="422"}': "0+50x300",
    'reranker_requests_total{route="/v1/rerank",status="499"}': "0+50x300",
    'reranker_request_duration_seconds_bucket{route="/v1/rerank",le="0.1"}': "0+100x300",
    'reranker_request_duration_seconds_bucket{route="/v1/rerank",le="+Inf"}': "0+100x300",
    'reranker_queue_wait_seconds_bucket{le="0.1"}': "0+100x300",
    'reranker_queue_wait_seconds_bucket{le="+Inf"}': "0+100x300",
}


def test_every_alert_fires_when_it_must_and_only_then(tmp_path: Path) -> None:
    promtool = tool("promtool")
    names = [rule["alert"] for rule in rules()]
    assert sorted(names) == sorted(SCENARIOS)

    def case(series: dict[str, str], at: str, firing: str | None) -> dict[str, Any]:
        # Compare the names of firing alerts, without labels and texts.
        found = [{"labels": f'{{alertname="{firing}"}}', "value": 1}] if firing else []
        if firing != "RerankerAbsent":
            series = {'up{job="reranker"}': "1x300"} | series
        query = 'count by (alertname) (ALERTS{alertstate="firing"})'
        return {
            "interval": "15s",
            "input_series": [{"series": name, "values": points} for name, points in series.items()],
            "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": found}],
        }

    cases = [case(series, at, name) for name, (series, at) in SCENARIOS.items()]
    ended = {"reranker_start_time_seconds": "1x8 2x8 3x8 4x60", "reranker_worker_restarts_total": "0x90"}  # containers
    cases += [case(ended, "10m", "RerankerRestarts"), case(QUIET, "65m", None)]
    test = {"rule_files": [str(ALERTS)], "evaluation_interval": "15s", "tests": cases}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    ran = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yml")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("file", FILES)
def test_monitoring_starts_only_when_asked_and_is_not_open_to_the_network(file: str) -> None:
    whole = compose(file)
    for name in ("prometheus", "grafana"):
        it = whole["services"][name]
        if "extends" in it:
            assert it == {"extends": {"file": "docker-compose.yml", "service": name}}
            it = compose("docker-compose.yml")["services"][name]
        assert it["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in it["ports"])
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", it["image"])
        assert f"{name}:" in " ".join(it["volumes"])
        assert name in whole["volumes"]
        for mount in it["volumes"]:
            source = mount.partition(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists()


@pytest.mark.parametrize(
    ("given", "token"),
    [
        ("", ""),
        ("one", "one"),
        (" one , two", "one"),
        (",two", "two"),
        ("t#1  # a comment", "t#1"),
        ("p%s$x\\n!", "p%s$x\\n!"),
        ('"one"', "one"),
        ("'one, two'  # a comment", "one"),
        ("ops=0123456789abcdef==, two", "ops=0123456789abcdef=="),  # the service accepts whole entries
    ],
)
def test_prometheus_takes_port_and_token_from_the_environment(tmp_path: Path, given: str, token: str) -> None:
    shell, flags, script = compose("docker-compose.yml")["services"]["prometheus"]["entrypoint"]
    script = script.replace("$$", "$").replace("/tmp/", f"{tmp_path}/").replace("/etc/prometheus/", f"{CONFIG.parent}/")
    assert "exec /bin/prometheus " in script
    script = script.replace("exec /bin/prometheus", "exec echo")
    environment = {"PATH": "/usr/bin:/bin", "ACCESS_TOKEN": given, "PORT": "7007"}
    subprocess.run([shell, flags, script], env=environment, check=True, capture_output=True)
    assert (tmp_path / "token").read_text() == token
    assert (tmp_path / "token").stat().st_mode & 0o077 == 0
    before, after = yaml.safe_load(CONFIG.read_text()), yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    assert after["scrape_configs"][0]["static_configs"] == [{"targets": ["reranker:7007"]}]
    before["scrape_configs"][0]["static_configs"] = after["scrape_configs"][0]["static_configs"]
    after["scrape_configs"][0]["authorization"] = before["scrape_configs"][0]["authorization"]  # moved by this test
    assert after == before


@pytest.mark.parametrize("token", ["tok", pytest.param("", marks=pytest.mark.slow)])
def test_a_real_prometheus_scrapes_and_every_panel_has_something_to_show(
    start: Start, tmp_path: Path, token: str
) -> None:
    program = tool("prometheus")
    server = start(command=FAKE, token=token, ACCESS_TOKEN=token, SCORE_CACHE_ENTRIES="100")
    (tmp_path / "token").write_text(token)
    text = CONFIG.read_text().replace("reranker:6006", f"127.0.0.1:{server.port}").replace("15s", "1s")
    text = text.replace("/etc/prometheus/", f"{ALERTS.parent}/").replace("/tmp/token", f"{tmp_path}/token")
    (tmp_path / "prometheus.yml").write_text(text)
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30, trust_env=False) as prometheus:

            def ask(expression: str) -> list[Any]:
                answer = prometheus.get("/query", params={"query": expression}).json()
                assert answer["status"] == "success", (expression, answer)
                result: list[Any] = answer["data"]["result"]
                return result

            def until(expression: str) -> None:
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    try:
                        if ask(expression):
                            return
                    except (httpx.TransportError, ValueError):  # not there yet, or not ready
                        pass
                    time.sleep(0.2)
                raise AssertionError(f"{expression} never came true:\n{(tmp_path / 'log').read_text()}")

            until('up{job="reranker"} == 1')
            for wanted in (1, 2):  # in two scrapes, so that there is a rate
                for i in range(10):  # none of them known to the cache
                    query = f"red {wanted} {i}"
                    server.client.post("/v1/rerank", json={"query": query, "documents": ["red fish", "a dog"]})
                server.client.post("/v1/rerank", json={"query": "too long", "documents": ["red"]})
                until(f"reranker_queue_wait_seconds_count == {10 * wanted}")
                until(f'reranker_errors_total{{error_type="invalid_request"}} == {wanted}')
            empty = []
            for title, expression in expressions():
                found = ask(expression.replace("$__rate_interval", "1m").replace("$instance", ".*"))
                if not [r for r in found if r["value"][1] != "NaN"]:
                    empty.append(title)
            assert not empty
            saved = ask("1 - sum(reranker_batch_tokens_sum) / sum(reranker_prompt_tokens_total)")
            assert float(saved[0]["value"][1]) == pytest.approx(10 / 24, abs=1e-3)
            assert len(prometheus.get("/rules").json()["data"]["groups"][0]["rules"]) == len(rules())
    finally:
        process.terminate()
        process.wait(30)
