"""The manifest of an output: everything its content depends on. Another run continues only with the same."""

from __future__ import annotations

import json
from typing import Any

from reranker.errors import InputError


def continues(content: bytes | None, manifest: dict[str, Any], output: str, *, overwrite: bool = False) -> bool:
    """Compare the manifest in an output (JSON; None: missing) with that of this run; False: overwrite the output.

    Raises:
        InputError: the manifests differ, without `overwrite`.
    """
    try:
        other = json.loads(content or b"")
        difference = " and ".join(f"another {key}" for key in manifest | other if other.get(key) != manifest.get(key))
    except (ValueError, TypeError, AttributeError):
        difference = "something unknown"
    if difference and not overwrite:
        fix = "use the same again, name another output, or --overwrite to start anew"
        raise InputError(f"{output} was begun with {difference}; {fix}")
    return not difference
