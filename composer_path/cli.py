"""The command `composer-path`: without a verb it prints the road, the verbs in the order in which one uses them."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from composer_path import __version__
from composer_path.commands.verb import ROAD, mistakes, module_of, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    verb, *words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(road())
        return 0
    if verb == "--version":
        print(f"composer_path {__version__}")
        return 0
    if verb not in ROAD:
        nearest = difflib.get_close_matches(verb, ROAD, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(ROAD)}"
        print(f"composer-path: there is no verb '{verb}'; {hint}", file=sys.stderr)
        return 2
    options = parse(verb, words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is read from files
    place = str(options.out) if "out" in options else None
    with mistakes(verb, place, only_ours=verb == "train") as ending:
        return module_of(verb).run(options)
    return ending.code


def road() -> str:
    """The verbs, a line each."""
    lines = [f"  {verb:<10}{str(module_of(verb).__doc__).splitlines()[0]}" for verb in ROAD]
    return "\n".join(["usage: composer-path VERB ...    VERB --help says more", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
