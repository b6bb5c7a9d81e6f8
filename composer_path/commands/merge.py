"""Publish a set that was converted with --part, if all parts are there and whole."""

from __future__ import annotations

import argparse
import os

from composer_path.commands.convert import convert_and_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the parts lie."""
    parser.add_argument("out", metavar="OUT", help="folder or address that the parts were written to")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="files read at once (default: cores)")


def run(options: argparse.Namespace) -> int:
    """Merge."""
    from composer_path.conversion.convert import merge

    return convert_and_report(
        lambda progress: merge(options.out, workers=options.workers, progress=progress), options.out
    )
