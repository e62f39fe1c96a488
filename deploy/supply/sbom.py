"""Write the run-time packages of the service as a CycloneDX document, without the tools that tests install.

cyclonedx-py environment .venv/bin/python | python deploy/supply/sbom.py SITE_PACKAGES requirements.txt OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packages import environment, needed, reduce


def main() -> None:
    """Reduce the document on standard input and validate the result."""
    site_packages, requirements, target = map(Path, sys.argv[1:])
    names = set(needed(requirements.read_text(encoding="utf-8"), environment(site_packages)))
    document = reduce(json.load(sys.stdin), names)
    text = json.dumps(document, indent=1)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        sys.exit(f"error: not a CycloneDX document: {str(problem).splitlines()[0]}")
    if len(document["components"]) != len(names):
        sys.exit(f"error: {len(names)} packages are needed, but {len(document['components'])} are in the document")
    target.write_text(text + "\n", encoding="utf-8")
    print(f"{target}: {len(names)} packages")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main()
