"""Train as a YAML says, or go on where the same command was stopped.

Several GPUs: `composer -n 8 train.py YAML` in a clone, `composer -n 8 -m composer_path.train YAML` elsewhere.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from composer_path.commands.verb import add_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML, and whether it is only checked."""
    add_yaml(parser)
    parser.add_argument("--check", action="store_true", help="list the mistakes in the YAML, and build nothing")
    parser.add_argument("--files", action="store_true", help="with --check: look at the files that it names, too")


def run(options: argparse.Namespace) -> int:
    """Check a YAML and the files that it names, and train; with `check` do the former alone, and files only if told.

    Raises:
        ConfigError: Lists all mistakes.
    """
    from composer_path.config.files import check_files, samples_left_out
    from composer_path.config.reading import ConfigError, load_config, plain

    config = load_config(options.yaml, options.words, allowed_imports=options.allowed_imports)
    if options.files or not options.check:
        if problems := check_files(plain(config)):
            raise ConfigError(options.yaml, problems)
        for line in samples_left_out(plain(config)):
            print(f"{options.yaml}: {line}", file=sys.stderr)
    if options.check:
        seen = ", nor in its files" if options.files else "; files were not looked for (--files does)"
        print(f"{options.yaml}: no mistake found{seen}")
        return 0
    check_launch()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("composer_path").setLevel(logging.INFO)
    from composer_path.train import train

    train(config)
    return 0


def check_launch() -> None:
    """Refuse what others left of a launcher's variables in this environment; ValueError."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}
    others = {name: os.environ[name] for name in alone if os.environ.get(name, alone[name]) != alone[name]}
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if others and (missing or not all(value.isdecimal() for value in others.values())):
        found = ", ".join(f"{name}='{value}'" for name, value in others.items())
        without = f" without {', '.join(missing)}" if missing else ""
        fix = f"start with `composer -n N train.py …`, or unset {' '.join(others)}"
        raise ValueError(
            f"environment: a launcher sets all of its variables, as numbers; found {found}{without}; {fix}"
        )
