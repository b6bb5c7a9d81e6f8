"""The command `composer-path`: without a verb it prints the road, the verbs in the order in which one uses them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from functools import partial

from composer_path import __version__
from composer_path.commands.verb import ROAD, exit_code, module_of, run_verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    verb, *words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ROAD:
        return run_verb(verb, words)
    if verb in ("-h", "--help", "--version"):
        return exit_code(partial(tell, verb), verb)
    nearest = difflib.get_close_matches(verb, ROAD, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(ROAD)}"
    print(f"composer-path: there is no verb '{verb}'; {hint}", file=sys.stderr)
    return 2


def tell(what: str) -> int:
    """Print the version, or the verbs, a line each."""
    road = (f"  {verb:<10}{str(module_of(verb).__doc__).splitlines()[0]}" for verb in ROAD)
    usage = "usage: composer-path VERB ...    VERB --help says more\n"
    print(f"composer_path {__version__}" if what == "--version" else "\n".join([usage, *road]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
