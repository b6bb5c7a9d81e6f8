"""Write a model folder from a run or one of its checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from composer_path.asking.run_table import CONFIG, PLACES
from composer_path.commands.verb import add_import


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, and where to."""
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="a run's folder (its newest whole checkpoint), or a checkpoint"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--config", type=Path, help="the run's config.yaml (default: the one of the run)")
    add_import(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the written weights (default: as trained)")


def run(options: argparse.Namespace) -> int:
    """Export."""
    checkpoint, config_path = find_checkpoint(options.run)
    config_path = options.config or config_path
    if not config_path.is_file():
        fix = "give a run's folder or a checkpoint in it, or name its configuration with --config"
        raise ValueError(f"'{options.run}': found no run configuration at '{config_path}'; {fix}")

    from composer_path.config.reading import load_config

    config = load_config(config_path, allowed_imports=options.imports)

    from composer_path.run.export import export_checkpoint

    export_checkpoint(checkpoint, config, options.out, options.dtype)
    print(f"model folder: {options.out}")
    return 0


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint that is meant, and where the configuration of its run lies.

    Raises:
        ValueError: A run's folder without a checkpoint.
    """
    checkpoints = path / PLACES["checkpoints"]
    if not checkpoints.is_dir() and not (path / CONFIG).is_file():
        # checkpoints/<name> lies in the run's folder; a latest link may point anywhere, so it isn't followed here
        return path, path.absolute().parent.parent / CONFIG
    from composer_path.checkpoints.folder import CheckpointFolder
    from composer_path.checkpoints.newest import newest_whole

    found = newest_whole(CheckpointFolder(checkpoints), clear=False)
    if found is None:
        fix = "trainer.save_interval says when a run saves; or name a checkpoint itself"
        raise ValueError(f"run '{path}': found no checkpoint in '{checkpoints}'; {fix}")
    return found.path, path / CONFIG
