"""List the public vision encoders that go by a name, with sizes, tokens and sources."""

from __future__ import annotations

import argparse

from composer_path.encoders.table import ENCODERS, LEFT_OUT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which ones, and how much of each."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these, with their keywords and sources")


def run(options: argparse.Namespace) -> int:
    """Print a line each, or all that is known of those that are named."""
    if unknown := [name for name in options.names if name not in ENCODERS]:
        raise ValueError(f"there is no encoder '{unknown[0]}'; composer-path encoders lists them")
    print("\n".join(described(name) for name in options.names) if options.names else listed())
    return 0


def listed() -> str:
    """The table: name, architecture, side of images and patches in pixels, tokens, normalisation, layout."""
    rows: list[tuple[str, ...]] = [("name", "architecture", "image", "patch", "tokens", "mean", "files of")]
    for name, recipe in ENCODERS.items():
        mean = " ".join(f"{value:.3f}" for value in recipe.normalization[0])
        sizes = (recipe.image_size, recipe.patch_size, recipe.num_tokens)
        rows.append((name, recipe.base, *map(str, sizes), mean, recipe.file))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    left_out = [f"left out: {name}: {why}" for name, why in LEFT_OUT.items()]
    return "\n".join([*lines, *left_out, "composer-path encoders NAME tells keywords and sources"])


def described(name: str) -> str:
    """All that is known of one encoder."""
    recipe = ENCODERS[name]
    mean, std = (list(values) for values in recipe.normalization)
    lines = [
        f"{name}: {recipe.base}, {recipe.image_size} px, patches of {recipe.patch_size} px, {recipe.num_tokens} tokens",
        f"  keywords: {dict(recipe.kwargs) or 'none'}",
        f"  mean {mean}, std {std}",
        f"  files of: {recipe.file}",
        *(f"  source: {source}" for source in recipe.sources),
    ]
    return "\n".join(lines)
