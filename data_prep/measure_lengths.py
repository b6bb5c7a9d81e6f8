"""Measure how long each sample of a run's sets is; the work is in composer_path.planning.measured_lengths."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if importlib.util.find_spec("composer_path") is None:  # run from a clone that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="measure_lengths.py",
        description="Write a small file with the number of tokens of each sample beside each set of a training YAML, "
        "for train_loader.balance. Images are not read; no text is stored.",
        epilog="Exit status: 0 written or already there, 1 a set or a place can't be read or written, 2 wrong "
        "arguments or a mistake in the YAML.",
    )
    parser.add_argument("yaml", metavar="YAML", help="of the run: its tokenizer, template and encoder decide lengths")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="as given to train.py")
    parser.add_argument(
        "--loader",
        choices=("train_loader", "eval_loader"),
        action="append",
        help="which sets (default: those of the loaders that are balanced, else train_loader's)",
    )
    parser.add_argument("--out", metavar="DIR_OR_URI", help="in place of LOADER.lengths or beside each set")
    parser.add_argument("--force", action="store_true", help="measure again what was measured before")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_intermixed_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    if any("=" not in word for word in options.overrides):
        parser.error("what follows the YAML must look like key=value")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse_arguments(arguments)
    # Only now: importing the training libraries takes seconds, and --help should not.
    from composer_path.config.reading import ConfigError, load_config, plain

    try:
        settings = plain(load_config(options.yaml, options.overrides))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    from composer_path.conversion.progress import every_ten_seconds
    from composer_path.planning.measured_lengths import measure

    report = functools.partial(every_ten_seconds, done="shards measured")
    loaders = tuple(options.loader) if options.loader else None
    try:
        for line in measure(settings, loaders, options.out, options.workers, options.force, report):
            print(line, flush=True)
    except (ValueError, OSError) as error:  # OSError: no space left, no right to write there, a store's refusal
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
