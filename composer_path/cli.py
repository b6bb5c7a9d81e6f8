"""The command `composer-path`: without a verb it prints the road, the verbs in the order in which one uses them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from composer_path import __version__
from composer_path.commands.verb import ROAD, module_of, run_verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    verb, *words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ROAD:
        return run_verb(verb, words)
    if verb not in ("-h", "--help", "--version"):
        nearest = difflib.get_close_matches(verb, ROAD, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(ROAD)}"
        print(f"composer-path: there is no verb '{verb}'; {hint}", file=sys.stderr)
        return 2
    print(f"composer_path {__version__}" if verb == "--version" else road())
    return 0


def road() -> str:
    """The verbs, a line each."""
    lines = [f"  {verb:<10}{str(module_of(verb).__doc__).splitlines()[0]}" for verb in ROAD]
    return "\n".join(["usage: composer-path VERB ...    VERB --help says more", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
