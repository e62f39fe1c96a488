"""The run-time packages of the service: requirements.txt and all dependencies of its packages."""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def environment(site_packages: Path) -> dict[str, Distribution]:
    """Return the packages of an environment by their normalised names."""
    return {canonicalize_name(d.metadata["Name"]): d for d in distributions(path=[str(site_packages)])}


def needed(requirements: str, installed: dict[str, Distribution]) -> dict[str, str]:
    """Return names with versions of the requirements and their dependencies.

    Raises:
        SystemExit: a requirement is not installed.
    """
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    pending = [(Requirement(line), "") for line in lines if line]
    seen: set[tuple[str, str]] = set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in installed:
            sys.exit(f"error: {name} is not installed; run `make serve` once")
        new = {(name, extra) for extra in ("", *requirement.extras)} - seen
        seen |= new
        pending += [(Requirement(line), extra) for _, extra in new for line in installed[name].requires or []]
    return {name: installed[name].version for name, _ in seen}


def reduce(document: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return a CycloneDX document with only these components and the dependencies between them."""
    components = [c for c in document["components"] if canonicalize_name(c["name"]) in names]
    refs = {component["bom-ref"] for component in components}
    dependencies = [
        {"ref": d["ref"], "dependsOn": sorted(refs.intersection(d.get("dependsOn", [])))}
        for d in document["dependencies"]
        if d["ref"] in refs
    ]
    return document | {"components": components, "dependencies": dependencies}
