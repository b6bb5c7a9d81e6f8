"""Write a model folder from a run or one of its checkpoints, or one in another program's shape."""

from __future__ import annotations

import argparse
from pathlib import Path

from composer_path.asking.run_table import CONFIG, PLACES
from composer_path.commands.verb import add_import, import_given

PROCESSOR_CONFIG = "processor_config.json"  # in an exported folder
# Names are those of composer_path/handing_on/shapes.py, which takes seconds to import.
SHAPES = {
    "llava-hf": "a stock LLaVA of transformers",
    "reference": "a folder of the reference's",
    "language-model": "the language model alone",
    "projector": "the projector alone",
    "onnx": "vision encoder and projector as one graph",
    "peft": "LoRA's adapters apart",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, and where to."""
    parser.add_argument(
        "run",
        metavar="RUN",
        type=path_or_address,
        help="a run's folder, here or in a bucket (its newest whole checkpoint), a checkpoint, or with --as an "
        "exported folder",
    )
    parser.add_argument("out", metavar="OUT", type=path_or_address, help="folder to write, on this disk")
    parser.add_argument("--config", type=Path, help="the run's config.yaml (default: the one of the run)")
    add_import(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the written weights (default: as trained)")
    words = "in another shape: " + "; ".join(f"{name} ({what})" for name, what in SHAPES.items())
    parser.add_argument(
        "--self-contained",
        action="store_true",
        help="put the model's code into the folder, for those who load it with trust_remote_code and not this package",
    )
    parser.add_argument("--as", dest="shape", metavar="SHAPE", choices=tuple(SHAPES), help=words)


def path_or_address(word: str) -> Path | str:
    """A path on this disk; an address stays a string."""
    return word if "://" in word else Path(word)


def run(options: argparse.Namespace) -> int:
    """Export."""
    if options.shape is not None and options.self_contained:
        fix = "leave one of the two out"
        raise ValueError(f"--self-contained: is for this project's own folder, found --as {options.shape}; {fix}")
    if isinstance(options.out, str):
        raise ValueError(f"OUT: must be a folder on this disk, found '{options.out}'; export, then copy it there")
    if isinstance(options.run, str):
        from composer_path.run.place import brought_here

        with brought_here(options.run) as checkpoint:
            return run(argparse.Namespace(**{**vars(options), "run": checkpoint}))
    if options.shape is not None and (options.run / PROCESSOR_CONFIG).is_file():
        return hand_on_folder(options)
    checkpoint, config_path = find_checkpoint(options.run)
    config_path = options.config or config_path
    if not config_path.is_file():
        fix = "give a run's folder or a checkpoint in it, or name its configuration with --config"
        raise ValueError(f"'{options.run}': found no run configuration at '{config_path}'; {fix}")

    from composer_path.config.reading import load_config

    config = load_config(config_path, allowed_imports=options.imports)
    if options.shape is None:
        from composer_path.run.export import export_checkpoint

        export_checkpoint(checkpoint, config, options.out, options.dtype, options.self_contained)
        print(f"model folder: {options.out}")
        return 0

    from composer_path.handing_on.shapes import SHAPES as WRITERS
    from composer_path.run.export import read_trained
    from composer_path.run.published import written_before

    written_before(options.out, options.shape)  # refused before weights are read
    WRITERS[options.shape](options.out, read_trained(checkpoint, config), options.dtype)
    print(f"{options.shape}: {options.out}")
    return 0


def hand_on_folder(options: argparse.Namespace) -> int:
    """The same for a folder that an export wrote."""
    if options.config is not None:
        raise ValueError(f"--config: is of a run, and '{options.run}' is an exported folder; leave it out")
    import_given(options)
    from composer_path.handing_on.shapes import SHAPES as WRITERS
    from composer_path.handing_on.trained_model import of_folder
    from composer_path.run.published import written_before

    written_before(options.out, options.shape)
    WRITERS[options.shape](options.out, of_folder(options.run), options.dtype)
    print(f"{options.shape}: {options.out}")
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
    from composer_path.checkpoints.newest import newest_of_run

    return newest_of_run(CheckpointFolder(checkpoints), str(path)).path, path / CONFIG
