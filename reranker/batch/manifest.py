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
    difference = _difference(content, manifest)
    if difference and not overwrite:
        raise InputError(
            f"{output} was begun with {difference}; use the same again, name another output, or --overwrite to start "
            f"anew"
        )
    return not difference


def _difference(content: bytes | None, manifest: dict[str, Any]) -> str:
    try:
        other = json.loads(content or b"")
        return " and ".join(f"another {key}" for key in manifest | other if other.get(key) != manifest.get(key))
    except (ValueError, TypeError, AttributeError):
        return "something unknown"
