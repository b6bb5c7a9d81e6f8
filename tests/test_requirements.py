"""The lists in requirements/ are whole: what they install meets its own needs, but for the overrides."""

from __future__ import annotations

import re
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

LINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!]+")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(LINE.fullmatch(line) for line in lines), "names and versions only"
    pairs = [(canonical(line.partition("==")[0]), line.partition("==")[2]) for line in lines]
    assert pairs == sorted(pairs) and len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.fixture(scope="module")
def stack(repo_root: Path) -> dict[str, str]:
    """Names and versions of the stack that the tests run on."""
    folder = repo_root / "requirements"
    both = {name: listed(folder / f"{name}.txt") for name in ("newest", "pinned")}
    installed = distribution("torch").version.partition("+")[0]
    found = [stack for stack in both.values() if stack["torch"] == installed]
    if not found:
        pytest.skip(f"torch {installed} is of neither stack")
    return listed(folder / "common.txt") | found[0]


def test_the_two_stacks_differ_in_the_same_places_only(repo_root: Path) -> None:
    common, newest, pinned, slow = (
        listed(repo_root / "requirements" / f"{name}.txt") for name in ("common", "newest", "pinned", "slow")
    )
    assert not common.keys() & (newest.keys() | pinned.keys() | slow.keys())
    both = newest.keys() & pinned.keys()
    assert {"torch", "torchvision", "transformers", "tokenizers", "triton", "liger-kernel", "torchao"} <= both
    assert all(newest[name] != pinned[name] for name in both)
    assert all(Version(newest[name]) > Version(pinned[name]) for name in both)


def test_what_is_listed_is_installed(stack: dict[str, str]) -> None:
    wrong = {name: distribution(name).version for name, version in stack.items() if _differs(name, version)}
    assert wrong == {}


def _differs(name: str, version: str) -> bool:
    return distribution(name).version.partition("+")[0] != version


def test_every_dependency_has_what_it_needs_but_for_the_overrides(stack: dict[str, str], repo_root: Path) -> None:
    lines = (repo_root / "requirements" / "overrides.txt").read_text(encoding="utf-8").splitlines()
    overridable = {line for line in lines if not line.startswith("#")}
    installed = {canonical(one.metadata["Name"]): one.version for one in distributions()}
    overridden, unmet = set(), []
    for name in [*stack, "composer-path"]:
        for line in distribution(name).requires or ():
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            found = installed.get(canonical(needed.name))
            if found is None or not needed.specifier.contains(found.partition("+")[0], prereleases=True):
                overridden.add(canonical(needed.name))
                if name not in ("mosaicml", "mosaicml-streaming") or canonical(needed.name) not in overridable:
                    unmet.append(f"{name} needs {needed.name}{needed.specifier}, found {found}")
    assert unmet == []
    assert overridden == (overridable if Version(stack["torch"]) > Version("2.7.0") else set())
