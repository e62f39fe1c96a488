"""Known vulnerabilities of what the service needs at run time, by pip-audit; and whether it could ask at all.

    python deploy/supply/audit.py SITE_PACKAGES requirements.txt

Where the network has packages but no advisories (a mirror, a proxy), pip-audit calls every package unknown and ends
well. So a package that is known to be vulnerable is asked about along with the others, and none may be left out.
Ends with 0: nothing is known; 1: something is; 2: nobody could be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packages import environment, needed

KNOWN = ("jinja2", "2.4.1")
"""CVE-2014-1402 and others."""
NO_ANSWER = (
    "error: the advisories could not be asked for, so nothing is known about these packages. This needs a network "
    "that reaches https://pypi.org/pypi/<name>/<version>/json itself; a mirror of the packages does not have them."
)


def ask(packages: list[tuple[str, str]]) -> list[dict[str, object]] | None:
    """pip-audit's answer for each package, or None when it gave none."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "asked.txt"), Path(folder, "answer.json")
        asked.write_text("".join(f"{name}=={version}\n" for name, version in packages), encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json", f"--output={answer}"]
        tool = str(Path(sys.executable).with_name("pip-audit"))
        subprocess.run([tool, *options, "-r", str(asked)], stderr=subprocess.DEVNULL, check=False)
        try:
            found: list[dict[str, object]] = json.loads(answer.read_text(encoding="utf-8"))["dependencies"]
        except (OSError, ValueError, KeyError):
            return None
        return found


def main() -> int:
    """Ask about every package and about the known one; say what was found."""
    site_packages, requirements = map(Path, sys.argv[1:])
    installed = needed(requirements.read_text(encoding="utf-8"), environment(site_packages))
    # Advisories are filed for 2.13.0 and not for the build 2.13.0+cpu.
    packages = sorted((name, version.partition("+")[0]) for name, version in installed.items())
    known = ask([KNOWN])
    if not known or not known[0].get("vulns"):
        print(NO_ANSWER, file=sys.stderr)
        return 2
    answers = ask(packages)
    if answers is None:
        print(NO_ANSWER, file=sys.stderr)
        return 2
    told = {str(answer["name"]) for answer in answers if "vulns" in answer}
    left_out = [name for name, _ in packages if name not in told]
    if left_out:
        print(f"{NO_ANSWER} Not known there: {', '.join(left_out)}.", file=sys.stderr)
        return 2
    bad = [answer for answer in answers if answer["vulns"]]
    for answer in bad:
        print(f"{answer['name']} {answer['version']}: {json.dumps(answer['vulns'])}")
    print(f"{len(packages)} packages, {len(bad)} with known vulnerabilities")
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main())
