"""List all mistakes in a YAML; nothing is built, unless `--invariance` asks for one step of the run.

Exit code: 0 none was found, 1 a step depends on how it is computed, 2 a mistake.
"""

from __future__ import annotations

import argparse
import sys

from composer_path.commands.train import run as check
from composer_path.commands.verb import add_yaml, at_least_1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML, and how far to look."""
    add_yaml(parser)
    add = parser.add_argument
    add("--files", action="store_true", help="look at the files that it names, too, as a start does")
    purpose = "compute one step in other microbatches, shardings and so on, and compare losses and gradients"
    add("--invariance", action="store_true", help=purpose)
    add("--ranks", type=at_least_1, metavar="N", help="with --invariance: also shared by so many ranks")
    parser.set_defaults(check=True)


def run(options: argparse.Namespace) -> int:
    """Check, and compare."""
    if options.ranks is not None and not options.invariance:
        raise ValueError("--ranks: says how many share a step; give it with --invariance")
    options.files = options.files or options.invariance
    code = check(options)
    if not options.invariance:
        return code
    from composer_path.planning.invariance import measure, table

    rows, dtype = measure(options.yaml, options.words, options.ranks or 1, lambda way: print(way, file=sys.stderr))
    text, holds = table(rows, dtype)
    print(text)
    return 0 if holds else 1
