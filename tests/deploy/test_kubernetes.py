"""deploy/kubernetes/: valid by Kubernetes' own schemas, and true of this service: ports, paths, names, times, user.

The schemas come with the package kubernetes-validate, because kubectl wants a cluster even for a dry run on the client.
The custom kinds (ScaledObject, ServiceMonitor, PrometheusRule, RayService) have no schema: the parts of Kubernetes' own
kinds in them are checked by those, and the rest against the service. test_kubernetes_model.py tests the download.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml  # type: ignore[import-untyped]

from config import Settings
from deploy import monitoring
from tests.conftest import FAKE, ROOT, Start
from tests.deploy.test_compose import every
from tests.http.test_monitoring import exported, tool  # noqa: F401
from tests.server.test_gunicorn_conf import _environment, conf  # noqa: F401

DEPLOY = ROOT / "deploy"
FOLDER = DEPLOY / "kubernetes"
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule", "RayService"}
LIBRARIES = {"HF_ENDPOINT", "HF_HUB_OFFLINE"}
"""Variables that are no settings but read by huggingface_hub."""

Object = dict[str, Any]


@cache
def everything() -> list[Object]:
    return [it for path in sorted(FOLDER.glob("*.yaml")) for it in yaml.safe_load_all(path.read_text())]


def one(kind: str, name: str = "reranker") -> Object:
    [found] = [it for it in everything() if (it["kind"], it["metadata"]["name"]) == (kind, name)]
    return found


def pod() -> Object:
    spec: Object = one("Deployment")["spec"]["template"]["spec"]
    return spec


def ray_pods() -> list[Object]:
    """Templates of the head and the workers."""
    cluster = one("RayService")["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def pods() -> list[Object]:
    return [pod(), *(template["spec"] for template in ray_pods())]


def containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def environment(container: Object) -> dict[str, str]:
    """The environment of a container, secrets by the names of their keys, with $(NAME) expanded as the kubelet does."""
    env: dict[str, str] = {}
    for source in container.get("envFrom", []):
        env |= one("ConfigMap", source["configMapRef"]["name"])["data"]
    for entry in container["env"]:
        value = entry.get("value")
        if value is None:
            [(kind, key)] = entry["valueFrom"].items()
            value = key["key"] if kind == "secretKeyRef" else one("ConfigMap", key["name"])["data"][key["key"]]
        env[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: env[match[1]], value)
    return env


def settings(container: Object) -> Settings:
    return Settings.model_validate({name.lower(): value for name, value in environment(container).items()})


# By Kubernetes' own schemas


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_every_object_is_valid(version: str) -> None:
    own = [it for it in everything() if it["kind"] not in CUSTOM]
    assert {it["kind"] for it in own} >= {"Deployment", "Service", "PodDisruptionBudget", "PersistentVolumeClaim"}
    for it in own:
        kubernetes_validate.validate(it, version, strict=True)
    for template in ray_pods():
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "PodTemplate", "template": template}, version, True)
    kubernetes_validate.validate(autoscaler(), version, strict=True)


def autoscaler() -> Object:
    """The HorizontalPodAutoscaler that KEDA makes of the ScaledObject."""
    spec = one("ScaledObject")["spec"]
    [trigger] = spec["triggers"]
    target = {"type": trigger["metricType"], "averageValue": trigger["metadata"]["threshold"]}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "keda-hpa-reranker"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment"} | spec["scaleTargetRef"],
            "minReplicas": spec["minReplicaCount"],
            "maxReplicas": spec["maxReplicaCount"],
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
            "metrics": [{"type": "External", "external": {"metric": {"name": "s0-prometheus"}, "target": target}}],
        },
    }


def test_objects_find_each_other() -> None:
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [one("Deployment")["spec"]["selector"]["matchLabels"], one("Service")["spec"]["selector"]]
    selectors += [one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]]
    selectors += [one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]]
    selectors += [spread["labelSelector"]["matchLabels"] for spread in pod()["topologySpreadConstraints"]]
    assert all(selector.items() <= labels.items() for selector in selectors)
    spec = one("PodDisruptionBudget", "reranker-ray")["spec"]
    budget = spec["selector"]["matchLabels"]
    assert (spec["minAvailable"], "maxUnavailable" in spec) == (1, False), "a RayCluster has no scale to ask"
    _, workers = ray_pods()
    assert budget.items() <= workers["metadata"]["labels"].items()
    assert not any(selector.items() <= workers["metadata"]["labels"].items() for selector in selectors)
    assert (
        one("ServiceMonitor")["spec"]["selector"]["matchLabels"].items() <= one("Service")["metadata"]["labels"].items()
    )
    assert one("ScaledObject")["spec"]["scaleTargetRef"] == {"name": one("Deployment")["metadata"]["name"]}
    for spec in pods():
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                one("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
            if "configMap" in volume:
                data = one("ConfigMap", volume["configMap"]["name"])["data"]
                assert {item["key"] for item in volume["configMap"]["items"]} <= set(data)
        names = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for c in containers(spec) for mount in c["volumeMounts"]} == names


# True of this service


def test_every_variable_is_a_setting() -> None:
    model = one("ConfigMap", "reranker-model")["data"]
    own = {"MODELS", *model} - {"download.sh"}
    for spec in pods():
        [main] = spec["containers"]
        ray = set(ray_environment()) if main["name"].startswith("ray-") else set()
        names = set(environment(main))
        assert names - own - ray - LIBRARIES <= {name.upper() for name in Settings.model_fields}
        assert "MODEL_NAME_OR_PATH" in names
        assert settings(main).workers == 1
    assert "ACCESS_TOKEN" not in one("ConfigMap")["data"], "tokens belong into the secret"


def test_ports_and_probes(start: Start) -> None:
    [main] = pod()["containers"]
    [port] = main["ports"]
    assert str(port["containerPort"]) == environment(main)["PORT"] == every("EXPOSE")[0]
    assert port["containerPort"] == Settings.model_fields["port"].default
    [service] = one("Service")["spec"]["ports"]
    assert (service["targetPort"], service["port"]) == (port["name"], port["containerPort"])
    [[allowed]] = [rule["ports"] for rule in one("NetworkPolicy")["spec"]["ingress"]]
    probes = {kind: main[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    [scrape] = one("ServiceMonitor")["spec"]["endpoints"]
    assert {allowed["port"], scrape["port"], *(probe["port"] for probe in probes.values())} == {port["name"]}
    [kept] = scrape["relabelings"]  # a pod that pulls or downloads would fire RerankerDown
    assert (kept["action"], kept["sourceLabels"], kept["regex"]) == ("keep", ["__meta_kubernetes_pod_phase"], "Running")

    env = {name: value for name, value in environment(main).items() if name not in ("HOST", "PORT", "LOG_FORMAT")}
    server = start(command=FAKE, token="ACCESS_TOKEN", wait=None, FAKE_LOAD_SECONDS="3", **env)
    server.wait_for("loading")

    def ask(url: str) -> int:
        return httpx.get(f"{server.client.base_url}{url}", trust_env=False, timeout=300).status_code

    assert {kind: ask(probe["path"]) for kind, probe in probes.items()} == {
        "startupProbe": 503,  # while it loads, only liveness would succeed
        "readinessProbe": 503,
        "livenessProbe": 200,
    }
    server.wait_for("ok")
    assert [ask(probe["path"]) for probe in probes.values()] == [200] * 3, "without the token"
    answer = server.client.get(scrape["path"])
    assert (ask(scrape["path"]), answer.status_code) == (401, 200)
    assert "reranker_queue_tokens" in answer.text


def test_times_match(monkeypatch: pytest.MonkeyPatch) -> None:
    [main] = pod()["containers"]
    it = settings(main)
    drain = conf(monkeypatch, REQUEST_TIMEOUT=environment(main)["REQUEST_TIMEOUT"])["graceful_timeout"]
    [program, pause] = main["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    assert int(pause) >= 2 * main["readinessProbe"]["periodSeconds"]
    grace = pod()["terminationGracePeriodSeconds"]
    assert int(pause) + drain < grace <= int(pause) + drain + 30
    startup = main["startupProbe"]["periodSeconds"] * main["startupProbe"]["failureThreshold"]
    assert it.load_timeout < startup < one("Deployment")["spec"]["progressDeadlineSeconds"]
    assert one("RayService")["spec"]["rayClusterDeletionDelaySeconds"] > drain


def test_containers_have_the_rights_of_the_image_and_no_more() -> None:
    [user] = every("USER")
    home = next(rest for rest in every("ENV") if "HOME=" in rest).split("HOME=")[1].split()[0]
    for spec in pods():
        who = spec["securityContext"]
        assert f"{who['runAsUser']}:{who['runAsGroup']}" == user
        assert (who["runAsNonRoot"], who["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
        assert {volume["name"]: volume.get("emptyDir", {}).get("medium") for volume in spec["volumes"]}[
            "shm"
        ] == "Memory"
        for container in containers(spec):
            rights = container["securityContext"]
            assert rights == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {home, "/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
        [main] = spec["containers"]
        assert "/dev/shm" in {mount["mountPath"] for mount in main["volumeMounts"]}
    assert pod()["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert ray_pods()[1]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_image_is_the_one_that_is_built() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    built = set(re.findall(r"docker build -t (\S+)", text))
    assert {c["image"].removesuffix(":latest") for spec in pods() for c in containers(spec)} == built


def test_the_secret_that_the_document_makes_has_the_keys_that_are_asked_for() -> None:
    command = re.search(r"kubectl create secret generic (\S+)((?: \\\n|.)*)", (ROOT / "docs/kubernetes.md").read_text())
    assert command is not None
    made = {(command[1], key) for key in re.findall(r"--from-literal=(\w+)=", command[2])}
    asked = re.findall(r"(?:secretKeyRef|credentials): \{name: ([\w-]+), key: (\w+)\}", raw())
    assert set(asked) == made


def raw() -> str:
    return "".join(path.read_text() for path in sorted(FOLDER.glob("*.yaml")))


def test_the_document_applies_files_that_exist() -> None:
    named = set(re.findall(r"deploy/kubernetes/([\w.-]+)", (ROOT / "docs" / "kubernetes.md").read_text()))
    assert named == {path.name for path in FOLDER.iterdir()}


# The autoscaler


def query() -> str:
    [trigger] = one("ScaledObject")["spec"]["triggers"]
    text: str = trigger["metadata"]["query"]
    return text


@pytest.mark.parametrize("name", monitoring.OBJECTS)
def test_alerts_and_dashboard_are_those_of_compose(name: str) -> None:
    """After a change of either: python -m deploy.monitoring"""
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text == monitoring.OBJECTS[name]()
    it = yaml.safe_load(text)
    if it["kind"] == "PrometheusRule":
        assert it["spec"] == yaml.safe_load(monitoring.ALERTS.read_text())
    else:
        assert it["data"]["reranker.json"] == monitoring.DASHBOARD.read_text()
        assert it["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_query_names_what_is_exported(exported: dict[str, set[str]]) -> None:  # noqa: F811
    names = set(re.findall(r"reranker_\w+", query()))
    assert "reranker_queue_tokens" in names
    assert names <= set(exported)
    assert set(re.findall(r'job="(\w+)"', query())) == {one("Service")["metadata"]["name"]}


def test_prometheus_computes_the_passes_that_wait(tmp_path: Path) -> None:
    promtool = tool("promtool")
    rule = {"record": "passes", "expr": query()}
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "g", "rules": [rule]}]}))
    series = {
        'reranker_queue_tokens{job="reranker",pod="a"}': "0x20 30000x40",  # 3 passes
        'reranker_batch_token_budget{job="reranker",pod="a"}': "10000x60",
        'reranker_queue_tokens{job="reranker",pod="b"}': "500x60",  # half of one
        'reranker_batch_token_budget{job="reranker",pod="b"}': "1000x60",
        'reranker_queue_tokens{job="reranker",pod="loading"}': "0x150",
        'reranker_batch_token_budget{job="reranker",pod="loading"}': "0x150",
        'reranker_queue_tokens{job="other",pod="c"}': "1000x60",
        'reranker_batch_token_budget{job="other",pod="c"}': "1000x60",
    }
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": "passes", "eval_time": time, "exp_samples": [{"labels": "passes", "value": value}]}
            for time, value in (("4m", 0.5), ("14m", 3.5), ("30m", 0))  # at last only the one that loads is left
        ]
        + [{"expr": "passes", "eval_time": "60m", "exp_samples": []}],  # no figures: no zero
    }
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": ["rules.yml"], "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Ray


def ray_environment() -> dict[str, str]:
    """RAY_ENVIRONMENT of deploy/ray_serve.py, read without Ray."""
    for node in ast.parse((DEPLOY / "ray_serve.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RAY_ENVIRONMENT":
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    raise AssertionError("deploy/ray_serve.py has no RAY_ENVIRONMENT")


def test_ray_runs_the_same_configuration_as_anywhere_else() -> None:
    spec = one("RayService")["spec"]
    serve = yaml.safe_load(spec["serveConfigV2"])
    assert serve == yaml.safe_load((DEPLOY / "ray_serve.yaml").read_text())
    assert serve["applications"][0]["import_path"] == "deploy.ray_serve:app"
    scaling = serve["applications"][0]["deployments"][0]["autoscaling_config"]
    [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (scaling["min_replicas"], scaling["max_replicas"])
    pins = (DEPLOY / "requirements-ray.txt").read_text()
    assert f"ray[serve,data]=={spec['rayClusterConfig']['rayVersion']} " in pins
    gunicorn = environment(pod()["containers"][0])
    for template in ray_pods():
        [main] = template["spec"]["containers"]
        assert {port["name"]: port["containerPort"] for port in main["ports"]}["serve"] == serve["http_options"]["port"]
        env = environment(main)
        assert env == {name: gunicorn[name] for name in env if name in gunicorn} | ray_environment()
        assert set(gunicorn) - set(env) == {"HOST", "PORT"}, "which http_options says"


def test_the_ray_image_holds_what_is_imported() -> None:
    lines = (FOLDER / "ray.Dockerfile").read_text().splitlines()
    patterns = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    copied = {str(path.relative_to(DEPLOY)) for pattern in patterns for path in DEPLOY.glob(pattern)}
    assert "requirements-ray.txt" in copied
    modules = set(re.findall(r"\bdeploy\.(\w+):\w+", raw()))
    assert {"ray_serve", "ray_proxy"} <= modules
    waiting = [*(f"{name}.py" for name in modules), "ray_batch.py"]  # which `python -m` names
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        assert name in copied
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((DEPLOY / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deploy"):
                of = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = {f"{str(it).removeprefix('deploy.').replace('.', '/')}" for it in of}
                waiting += [f for it in files for f in (f"{it}.py", f"{it}/__init__.py") if (DEPLOY / f).is_file()]
    assert [line for line in lines if line.startswith("USER")][-1] == f"USER {every('USER')[0]}"
