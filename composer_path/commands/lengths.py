"""Write down how many tokens each sample of a YAML's sets has, for train_loader.balance.

A small file beside each set; images are not read, no text is stored.
"""

from __future__ import annotations

import argparse
from functools import partial

from composer_path.commands.verb import add_workers, add_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML, whose tokenizer, template and encoder decide lengths, and where to write."""
    add_yaml(parser)
    which = "which sets (default: those of the loaders that are balanced, else train_loader's)"
    parser.add_argument("--loader", choices=("train_loader", "eval_loader"), action="append", help=which)
    parser.add_argument("--out", metavar="DIR_OR_URI", help="in place of LOADER.lengths or beside each set")
    parser.add_argument("--force", action="store_true", help="measure again what was measured before")
    add_workers(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, and print a line a set."""
    from composer_path.config.reading import load_config, plain

    settings = plain(load_config(options.yaml, options.words, allowed_imports=options.allowed_imports))

    from composer_path.conversion.progress import every_ten_seconds
    from composer_path.planning.measured_lengths import measure

    report = partial(every_ten_seconds, done="shards measured")
    loaders = tuple(options.loader) if options.loader else None
    for line in measure(settings, loaders, options.out, options.workers, options.force, report):
        print(line, flush=True)
    return 0
