"""Audit the packages that the service needs at run time with pip-audit; fail if the advisories cannot be read.

    python deploy/supply/audit.py SITE_PACKAGES requirements.txt

On a network with packages but without advisories (a mirror, a proxy), pip-audit skips every package and succeeds.
Therefore it also has to report a package with known vulnerabilities, and may skip none.
Exit codes: 0: no known vulnerabilities; 1: some; 2: the advisories could not be read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packages import environment, needed

KNOWN = {"jinja2": "2.4.1"}
"""CVE-2014-1402 and others."""
NO_ANSWER = (
    "error: the advisories could not be asked for, so nothing is known about these packages. This needs a network "
    "that reaches the JSON API (/pypi/<name>/<version>/json) of the package index itself; a mirror does not have it."
)


def vulnerabilities(packages: dict[str, str]) -> dict[str, list[object]]:
    """Run pip-audit on names with versions; return the vulnerabilities of every package it did not skip."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, report = Path(folder, "requirements.txt"), Path(folder, "report.json")
        requirements.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()), encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json", f"--output={report}"]
        tool = str(Path(sys.executable).with_name("pip-audit"))
        subprocess.run([tool, *options, "-r", str(requirements)], stderr=subprocess.DEVNULL, check=False)
        try:
            rows = json.loads(report.read_text(encoding="utf-8"))["dependencies"]
        except (OSError, ValueError, KeyError):
            return {}
    return {row["name"]: row["vulns"] for row in rows if "vulns" in row}


def main() -> int:
    """Audit the known package, then those of the service; print the result."""
    site_packages, requirements = map(Path, sys.argv[1:])
    installed = needed(requirements.read_text(encoding="utf-8"), environment(site_packages))
    # Advisories are filed for 2.13.0 and not for the build 2.13.0+cpu.
    packages = {name: version.partition("+")[0] for name, version in sorted(installed.items())}
    answers = vulnerabilities(packages) if any(vulnerabilities(KNOWN).values()) else {}
    skipped = [name for name in packages if name not in answers]
    if skipped:
        print(f"{NO_ANSWER} Not known there: {', '.join(skipped)}." if answers else NO_ANSWER, file=sys.stderr)
        return 2
    bad = {name: found for name, found in answers.items() if found}
    for name, found in bad.items():
        print(f"{name} {packages[name]}: {json.dumps(found)}")
    print(f"{len(packages)} packages, {len(bad)} with known vulnerabilities")
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main())
