"""Advisories that name a version in requirements/: `python tests/advisories.py` (or `make advisories`).

pip-audit is asked about both stacks where it is installed and reaches its database; what it finds must stand in
requirements/advisories.yaml. That list is checked in any case: see `problems`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
STACKS = {name: ("common.txt", f"{name}.txt") for name in ("newest", "pinned")}
FIELDS = {"id", "package", "affected", "lists", "what", "reached", "why", "absent", "test", "source"}


def reviewed() -> list[dict[str, Any]]:
    """The committed list."""
    return yaml.safe_load((REQUIREMENTS / "advisories.yaml").read_text(encoding="utf-8"))["advisories"]


def versions(stack: str) -> dict[str, str]:
    """Names and versions of a stack."""
    lines = [line for file in STACKS[stack] for line in (REQUIREMENTS / file).read_text(encoding="utf-8").splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def problems(entries: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with a list: one line for each mistake."""
    installed = {stack: versions(stack) for stack in STACKS}
    code = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "composer_path").rglob("*.py"))}
    seen: set[str] = set()
    for entry in entries:
        where = f"advisories.yaml: {entry.get('id')}"
        if wrong := FIELDS ^ (entry.keys() - {"aliases"}):
            yield f"{where}: needs {', '.join(sorted(FIELDS))}; found too many or too few: {', '.join(sorted(wrong))}"
            continue
        if entry["id"] in seen or not str(entry["source"]).startswith("https://"):
            yield f"{where}: must stand once and say where it was read"
        seen |= {entry["id"]}
        if entry["reached"] not in ("no", "maybe", "yes"):
            yield f"{where}: reached must be no, maybe or yes, in quotes; found {entry['reached']!r}"
        if not any(entry["package"] in stack for stack in installed.values()):
            yield f"{where}: {entry['package']} is in neither list; remove the entry"
            continue
        affected = SpecifierSet(entry["affected"], prereleases=True)
        touched = [name for name, stack in installed.items() if stack.get(entry["package"], "") in affected]
        if not touched:
            yield f"{where}: no list holds an affected version any more; remove the entry"
        elif touched != entry["lists"]:
            yield f"{where}: must name the lists {touched}, found {entry['lists']}"
        file, _, test = entry["test"].partition("::")
        if not (ROOT / file).is_file() or f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"):
            yield f"{where}: there is no test {entry['test']}"
        for pattern in entry["absent"]:
            for path, text in code.items():
                if found := re.search(pattern, text):
                    yield f"{where}: its reason holds while nothing says {pattern}; found {found[0]!r} in {path.name}"


def audit(stack: str) -> dict[str, list[set[str]]] | None:
    """What pip-audit knows of a stack: a set of names for each advisory, by package; None where it can't tell.

    It calls a package that its database doesn't answer for "skipped", and ends with 0: that is no answer.
    """
    program = shutil.which("pip-audit")
    if program is None:
        return None
    files = [word for name in STACKS[stack] for word in ("--requirement", str(REQUIREMENTS / name))]
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run([program, *files, *options], capture_output=True, text=True, check=False)
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return None
    if not answers or any("skip_reason" in answer for answer in answers):
        return None
    return {
        answer["name"]: [{found["id"], *found["aliases"]} for found in answer["vulns"]]
        for answer in answers
        if answer["vulns"]
    }


def main() -> int:
    """Print what was found; 1 where something is new, or wrong in the list."""
    entries = reviewed()
    lines = list(problems(entries))
    known = {name for entry in entries for name in (entry["id"], *entry.get("aliases", ()))}
    known |= {word for entry in entries for word in re.findall(r"(?:CVE|PYSEC)-\d+-\d+", entry["what"])}
    for stack in STACKS:
        found = audit(stack)
        if found is None:
            print(f"{stack}: pip-audit isn't installed or doesn't reach its database; the committed list stands for it")
        for package, advisories in (found or {}).items():
            for names in advisories:
                if not names & known:
                    lines.append(f"{stack}: {package}: {', '.join(sorted(names))} is not in advisories.yaml; review it")
    for entry in entries:
        if entry["reached"] != "no":
            print(f"open ({entry['reached']}): {entry['id']} in {entry['package']}: {entry['what']}. {entry['why']}")
    print(*lines, f"{len(entries)} advisories reviewed, {len(lines)} problems", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
