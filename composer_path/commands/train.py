"""Train as a YAML says, or go on where the same command was stopped.

Several GPUs: `composer -n 8 train.py YAML` in a clone, `composer -n 8 -m composer_path.train YAML` elsewhere.
"""

from __future__ import annotations

import argparse

from composer_path.commands.verb import add_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML, and whether it is only checked."""
    add_yaml(parser)
    parser.add_argument("--check", action="store_true", help="list the mistakes in the YAML, and build nothing")
    parser.add_argument("--files", action="store_true", help="with --check: look at the files that it names, too")


def run(options: argparse.Namespace) -> int:
    """Check, and train."""
    from composer_path.train import start

    return start(options)
