"""requests, with the native bodies."""

from __future__ import annotations

import requests

from conftest import BEST, DOCUMENTS, QUERY, TOKEN

BODY = {"query": QUERY, "documents": DOCUMENTS}


def test_native(url: str) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    array = requests.post(f"{url}/v1/rerank", json=BODY, headers=headers, timeout=300).json()
    assert array[0]["index"] == BEST
    results = requests.post(f"{url}/api/v1/rerank?access_token={TOKEN}", json=BODY, timeout=300).json()["results"]
    assert results[0] == {"index": BEST, "relevance_score": results[0]["relevance_score"], "text": DOCUMENTS[BEST]}
    refused = requests.post(f"{url}/v1/rerank", json=BODY, timeout=300)
    assert refused.status_code == 401
    assert refused.json()["detail"].startswith("no token was sent")
