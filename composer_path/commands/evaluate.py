"""Ask closed questions, with their images and with blank ones.

The table is also left in the model's folder, for `summary`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from composer_path.commands.verb import add_import, at_least_1, import_given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the questions."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="written by export or at a run's end")
    add_import(parser)
    parser.add_argument("--data", type=Path, required=True, help="records whose meta has options and answer")
    parser.add_argument("--images", type=Path, required=True, help="folder of their images")
    parser.add_argument("--batch-size", type=at_least_1, default=16, help="asked at once (default: 16)")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    if not options.images.is_dir():
        raise ValueError(f"--images {options.images}: there is no such folder")

    from composer_path.asking.closed_questions import compare_with_blank, read_closed_questions

    questions = read_closed_questions(options.data)

    from composer_path.asking.assistant import Assistant
    from composer_path.asking.run_table import EVALUATION, format_closed
    from composer_path.weights.folder import write_json

    import_given(options)
    comparison = compare_with_blank(
        Assistant.from_pretrained(options.model), questions, options.images, options.batch_size
    )
    print(format_closed(comparison))
    write_json(options.model / EVALUATION, comparison)
    return 0
