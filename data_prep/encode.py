"""Store vision features in place of a set's images; the work is in composer_path.planning.encoded_features."""

from __future__ import annotations

import argparse
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
        prog="encode.py",
        description="Run a set's images through a training YAML's frozen vision encoder and write a set that holds its "
        "features (bf16) instead; all else stays as it is. docs/batches.md says when that pays.",
        epilog="Exit status: 0 written, 1 nothing written because of a set or a place, 2 wrong arguments or a mistake "
        "in the YAML.",
    )
    parser.add_argument("yaml", metavar="YAML", help="of the run: its encoder, fit and decoder")
    parser.add_argument("shards", metavar="DIR_OR_URI", help="the set of images")
    parser.add_argument("out", metavar="NEW", help="folder or address for the set of features; nothing may lie there")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="as given to train.py")
    parser.add_argument("--batch-size", type=int, default=32, help="images that are encoded together (default: 32)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode (default: cores)")
    options = parser.parse_intermixed_args(arguments)
    if options.workers < 1 or options.batch_size < 1:
        parser.error("--workers and --batch-size must be at least 1")
    if any("=" not in word for word in options.overrides):
        parser.error("what follows NEW must look like key=value")
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
    from composer_path.planning.encoded_features import build_feature_encoder, encode_set
    from composer_path.shards.view import ShardView

    try:
        view, encoder = ShardView(options.shards), build_feature_encoder(settings, options.device)
        report = every_ten_seconds(len(view), "samples encoded")
        print(encode_set(view, options.out, encoder, options.batch_size, options.workers, report))
    except (ValueError, OSError) as error:  # OSError: no space left, no right to write there, a store's refusal
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
