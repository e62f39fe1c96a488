"""Which of the installed packages the service needs at run time: requirements.txt, and what that needs in turn."""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(requirements: str, installed: dict[str, Distribution]) -> dict[str, str]:
    """Name -> version of every package that the requirements lead to, among those `installed`.

    Raises:
        SystemExit: a requirement is not installed.
    """
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    todo = [(Requirement(line), "") for line in lines if line]
    seen: set[tuple[str, str]] = set()
    found: dict[str, str] = {}
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in installed:
            sys.exit(f"error: {name} is not installed; run `make serve` once")
        found[name] = installed[name].version
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(Requirement(line), wanted) for line in installed[name].requires or []]
    return found


def environment(site_packages: Path) -> dict[str, Distribution]:
    """The packages of an environment by their normalised names."""
    return {canonicalize_name(d.metadata["Name"]): d for d in distributions(path=[str(site_packages)])}


def reduce(document: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The document with these components alone, and with the edges between them."""
    components = [c for c in document["components"] if canonicalize_name(c["name"]) in names]
    kept = {component["bom-ref"] for component in components}
    dependencies = [
        {"ref": d["ref"], "dependsOn": sorted(kept.intersection(d.get("dependsOn", [])))}
        for d in document["dependencies"]
        if d["ref"] in kept
    ]
    return document | {"components": components, "dependencies": dependencies}
