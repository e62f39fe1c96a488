"""The service's metrics among Ray's own: each node shows those of its replicas to Prometheus, with the replica's name.

Behind Ray's router GET /metrics answers for whichever replica it comes to. Ray's agent on every node (`ray start
--metrics-export-port`) has them all: `reranker_queue_tokens` is `ray_reranker_queue_tokens` there, and
deploy/prometheus/ray.yml takes the prefix off again, so that board and alerts stay as they are.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from ray.serve.metrics import Gauge

from reranker.http.metrics import Metrics

_SECONDS = 5


def share(metrics: Metrics) -> None:
    """Hand all values to Ray every few seconds, from a thread that ends with the process."""

    def forever() -> None:
        gauges: dict[str, Any] = {}
        while True:
            for family in metrics.registry.collect():
                for sample in family.samples:
                    # A gauge for counters and buckets too: they are counted already, and rate() does not mind.
                    if sample.name not in gauges:
                        gauges[sample.name] = Gauge(sample.name, family.documentation, tuple(sample.labels))
                    gauges[sample.name].set(sample.value, dict(sample.labels))
            time.sleep(_SECONDS)

    threading.Thread(target=forever, name="metrics", daemon=True).start()
