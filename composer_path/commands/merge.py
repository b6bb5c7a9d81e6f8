"""Publish a set that was converted with --part, if all parts are there and whole."""

from __future__ import annotations

import argparse

from composer_path.commands.convert import convert_and_report
from composer_path.commands.verb import add_workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the parts lie."""
    parser.add_argument("out", metavar="OUT", help="folder or address that the parts were written to")
    add_workers(parser, "files read at once")


def run(options: argparse.Namespace) -> int:
    """Merge."""
    from composer_path.conversion.convert import merge

    out, workers = options.out, options.workers
    return convert_and_report(lambda progress: merge(out, workers=workers, progress=progress), out)
