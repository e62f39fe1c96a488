"""Export the service's metrics through Ray: each node serves those of its replicas, labelled by replica.

Behind Ray's router, GET /metrics reaches only one replica. Ray's agent on every node (`ray start
--metrics-export-port`) has the metrics of all: `reranker_queue_tokens` is `ray_reranker_queue_tokens` there, and
deploy/prometheus/ray.yml removes the prefix, so dashboard and alerts need no change.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from ray.serve.metrics import Gauge

from reranker.http.metrics import Metrics

_SECONDS = 5


def share(metrics: Metrics) -> None:
    """Copy all values to Ray every few seconds, in a daemon thread."""

    def copy_forever() -> None:
        gauges: dict[str, Any] = {}
        while True:
            for family in metrics.registry.collect():
                for sample in family.samples:
                    # Gauges for counters and buckets too: their values are sums already, and rate() accepts gauges.
                    if sample.name not in gauges:
                        gauges[sample.name] = Gauge(sample.name, family.documentation, tuple(sample.labels))
                    gauges[sample.name].set(sample.value, dict(sample.labels))
            time.sleep(_SECONDS)

    threading.Thread(target=copy_forever, name="metrics", daemon=True).start()
