"""Write YAMLs of both stages into a folder, and with --demo what the demo needs."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

STARTER = Path(__file__).resolve().parent.parent / "starter"  # links in a clone, copies in a wheel
DEMO = "test_data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and whether with the demo's data."""
    parser.add_argument("out", metavar="DIR", type=Path, help="made if it isn't there; nothing in it is overwritten")
    parser.add_argument("--demo", action="store_true", help="also the demo's images, records and tokenizer")


def run(options: argparse.Namespace) -> int:
    """Copy the files, or refuse if one of them is there."""
    names = starter_files(options.demo)
    if there := [name for name in names if os.path.lexists(options.out / name)]:
        found = f"{', '.join(there[:3])}{' and more' if len(there) > 3 else ''}"
        raise ValueError(f"{options.out}: nothing is overwritten, found {found}; choose another folder")
    for name in names:
        (options.out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(STARTER / name, options.out / name)
    print(f"{len(names)} files in {options.out}")
    return 0


def starter_files(demo: bool) -> list[str]:
    """The names of what is written, relative to the folder."""
    walk = os.walk(STARTER, followlinks=True)
    found = (Path(folder, name).relative_to(STARTER) for folder, _, names in walk for name in names)
    return sorted(path.as_posix() for path in found if demo or path.parts[0] != DEMO)
