"""List all mistakes in a YAML; nothing is built."""

from __future__ import annotations

import argparse

from composer_path.commands.train import run
from composer_path.commands.verb import add_yaml

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML, and how far to look."""
    add_yaml(parser)
    parser.add_argument("--files", action="store_true", help="look at the files that it names, too, as a start does")
    parser.set_defaults(check=True)
