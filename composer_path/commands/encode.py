"""Write a set that holds a frozen vision encoder's features (bf16) in place of images.

All else stays as it is; docs/batches.md says when it pays.
"""

from __future__ import annotations

import argparse

from composer_path.commands.verb import add_workers, add_yaml, at_least_1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML, the set, and where to write."""
    out = "folder or address for the set of features; nothing may lie there"
    add_yaml(parser, shards="the set of images: a folder or an address", out=out)
    parser.add_argument("--batch-size", type=at_least_1, default=32, help="images encoded together (default: 32)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: a GPU where there is one)")
    add_workers(parser, "threads")


def run(options: argparse.Namespace) -> int:
    """Encode, and print what was written."""
    from composer_path.config.reading import load_config, plain

    settings = plain(load_config(options.yaml, options.words, allowed_imports=options.allowed_imports))

    from composer_path.conversion.progress import every_ten_seconds
    from composer_path.planning.encoded_features import build_feature_encoder, encode_set
    from composer_path.shards.view import ShardView

    view, encoder = ShardView(options.shards), build_feature_encoder(settings, options.device)
    report = every_ten_seconds(len(view), "samples encoded")
    print(encode_set(view, options.out, encoder, options.batch_size, options.workers, report))
    return 0
