"""What all verbs share: the road they make, how their words are read, and what a mistake of the user ends in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType, SimpleNamespace, TracebackType

from composer_path import __version__

# In the order in which one uses them.
DATA_VERBS = ("init", "convert", "merge", "shards", "lengths", "encode")
ROAD = (*DATA_VERBS, "check", "plan", "train", "export", "ask", "evaluate", "summary")


def module_of(verb: str) -> ModuleType:
    """The module of a verb; its docstring says what the verb does."""
    return import_module(f"composer_path.commands.{verb}")


def parse(verb: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the words behind a verb; a mistake in them exits with 2.

    Words of a list, such as key=value, may stand before and behind flags; they are found in `words`.
    """
    module = module_of(verb)
    parser = argparse.ArgumentParser(prog=f"composer-path {verb}", description=module.__doc__)
    parser.add_argument("--version", action="version", version=f"composer_path {__version__}")
    module.add_arguments(parser)
    options, rest = parser.parse_known_args(arguments)
    # argparse ends a list at the first flag; what follows is left over
    if rest and (not hasattr(options, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.words = [*options.words, *rest]
    return options


@contextmanager
def mistakes(verb: str, place: str | None = None, only_ours: bool = False) -> Iterator[SimpleNamespace]:
    """Let a mistake of the user end in its words on stderr; a bug of ours shows its traceback.

    Args:
        verb: Named before the words.
        place: Where the verb writes to, named if the system's error names no file.
        only_ours: Whether a library's error is a bug: a long run meets more than its user's mistakes.

    Yields:
        What has the exit code after a mistake, `code`.
    """
    ending = SimpleNamespace(code=2)
    try:
        yield ending
    except KeyboardInterrupt:
        ending.code = 130  # what a shell reports of a program that was interrupted
        print(file=sys.stderr)
    except (ValueError, OSError) as error:
        if only_ours and not _is_ours(error.__traceback__):
            raise
        words = str(error)
        if isinstance(error, OSError) and error.strerror is not None:
            where = error.filename or place
            words = f"{where}: {error.strerror}" if where else error.strerror
        print(f"composer-path {verb}: {words}", file=sys.stderr)


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether a line of this package raised the error."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__")).startswith("composer_path.")


def add_yaml(parser: argparse.ArgumentParser) -> None:
    """A run's YAML and its overrides."""
    parser.add_argument("yaml", metavar="YAML", help="the run's")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """What changes a YAML: `options.words`."""
    purpose = "overrides, such as trainer.max_duration=2ep"
    parser.add_argument("words", metavar="key=value", nargs="*", default=[], help=purpose)


def at_least_1(text: str) -> int:
    """A number of things of which there must be one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)
