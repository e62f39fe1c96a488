"""Write the alerts and the dashboard as Kubernetes objects: `python -m deploy.monitoring` after a change of either.

The Prometheus Operator reads a PrometheusRule, and the sidecar of Grafana's chart reads each ConfigMap with the label
`grafana_dashboard`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

_DEPLOY = Path(__file__).parent
ALERTS, DASHBOARD = _DEPLOY / "prometheus" / "alerts.yml", _DEPLOY / "grafana" / "reranker.json"
_NAME = {"app.kubernetes.io/name": "reranker"}
_RULES = "For the\n# Prometheus Operator; add the label by which your Prometheus selects rules, often `release`."
_HEAD = "# A copy of deploy/{path}, written by: python -m deploy.monitoring. {use}\n"


def rule() -> str:
    """Return the PrometheusRule of the alerts."""
    head = _HEAD.format(path="prometheus/alerts.yml", use=_RULES)
    meta = {"name": "reranker", "labels": _NAME}
    spec = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    return head + _yaml(
        {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": meta, "spec": spec}
    )


def dashboard() -> str:
    """Return the ConfigMap of the dashboard."""
    head = _HEAD.format(path="grafana/reranker.json", use="For the dashboard sidecar of Grafana.")
    meta = {"name": "reranker-dashboard", "labels": _NAME | {"grafana_dashboard": "1"}}
    data = {"reranker.json": DASHBOARD.read_text(encoding="utf-8")}
    return head + _yaml({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})


OBJECTS = {"alerts.yaml": rule, "dashboard.yaml": dashboard}
"""By the name of the file in deploy/kubernetes."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # not typed
    """Texts of several lines as blocks."""


def _text(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(value: object) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return text


if __name__ == "__main__":
    for name, make in OBJECTS.items():
        (_DEPLOY / "kubernetes" / name).write_text(make(), encoding="utf-8")
