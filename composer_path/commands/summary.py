"""Show a table of the runs below a folder: losses, speed, closed questions, places."""

from __future__ import annotations

import argparse
from pathlib import Path

from composer_path.asking.run_table import format_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("root", metavar="ROOT", type=Path, help="the runs' save_root")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    print(format_runs(options.root))
    return 0
