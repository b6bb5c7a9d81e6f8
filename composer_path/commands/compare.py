"""Compare two models: which tensors and settings differ, by how much, and if asked their logits."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from composer_path.commands.verb import add_import, import_given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which two, and what to tell."""
    purpose = "a file of tensors, or a folder: an export, also as llava-hf, reference or language-model; a LLaVA's"
    parser.add_argument("a", metavar="A", type=Path, help=purpose)
    parser.add_argument("b", metavar="B", type=Path, help="likewise")
    parser.add_argument("--logits", action="store_true", help="ask both about --image, and compare their logits")
    parser.add_argument("--image", type=Path, help="the picture for --logits")
    parser.add_argument("--question", help="the question for --logits (default: what the image shows)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_import(parser)


def finite(value: Any) -> Any:
    """Plain data with null for a difference that is infinite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(member) for key, member in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(options: argparse.Namespace) -> int:
    """Compare; 0 where both are equal, 1 where they differ."""
    if options.logits != (options.image is not None):
        raise ValueError("--logits and --image: must both be given, found one; give a picture to ask about")
    if options.question is not None and not options.logits:
        raise ValueError("--question: is for --logits, which isn't given; add it with an --image")
    import_given(options)

    from composer_path.handing_on.comparison import compare, told

    found = compare(options.a, options.b)
    logits = None
    if options.logits:
        from composer_path.handing_on.probe import QUESTION, compare_logits

        logits = compare_logits(options.a, options.b, options.image, options.question or QUESTION)
    if options.json:
        content = found.to_json() | ({} if logits is None else {"logits": vars(logits)})
        print(json.dumps(finite(content), indent=2, allow_nan=False))
    else:
        print("\n".join(told(found)))
        if logits is not None:
            other = f"another token first at {logits.other_choices} of {logits.positions} positions"
            print(f"logits: {logits.max_abs:.3g} (relative {logits.max_rel:.3g}), {other}")
    return 0 if found.equal else 1
