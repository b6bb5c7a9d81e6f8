"""What all verbs share: the road they make, how their words are read, and what a mistake of the user ends in."""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from traceback import format_exc, walk_tb
from types import ModuleType
from typing import NoReturn

from composer_path import __version__
from composer_path.guards.ending import (
    INTERRUPTED,
    LOST,
    LOST_WORDS,
    MISTAKE,
    RunStopped,
    Voice,
    lost_rank,
    lost_worker,
)
from composer_path.printable import printable_lines

# In the order in which one uses them.
DATA_VERBS = ("init", "census", "convert", "merge", "shards", "lengths", "encode")
ROAD = (*DATA_VERBS, "encoders", "check", "plan", "train", "export", "compare", "ask", "serve", "evaluate", "summary")


class Parser(argparse.ArgumentParser):
    """Reads words; a mistake in them is one line, as every mistake of the user."""

    def error(self, message: str) -> NoReturn:
        """Say it, and exit with 2."""
        self.exit(2, f"{self.prog}: {message}; --help says more\n")


def module_of(verb: str) -> ModuleType:
    """The module of a verb; its docstring says what the verb does."""
    return import_module(f"composer_path.commands.{verb}")


def run_verb(verb: str, arguments: Sequence[str] | None = None) -> int:
    """Do what the words behind a verb say (default: those of the command line), and return the exit code."""
    options = parse(verb, arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is read from files
    # What torchao does there, and which kernels bitsandbytes misses on a CPU of this kind, concerns their developers.
    for library in ("torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    return exit_code(lambda: module_of(verb).run(options), verb, str(options.out) if "out" in options else None)


def parse(verb: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the words behind a verb; a mistake in them exits with 2.

    Words of a list, such as key=value, may stand before and behind flags; they are found in `words`.
    """
    module = module_of(verb)
    parser = Parser(prog=f"composer-path {verb}", description=module.__doc__)
    parser.add_argument("--version", action="version", version=f"composer_path {__version__}")
    module.add_arguments(parser)
    options, rest = parser.parse_known_args(arguments)
    # argparse ends a list at the first flag; what follows is left over
    if rest and (not hasattr(options, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.words = [*options.words, *rest]
    return options


def exit_code(work: Callable[[], int], verb: str, place: str | None = None) -> int:
    """Work, and return its code; a mistake of the user ends in a line on stderr, a bug of ours in its traceback.

    Of `train`, a library's ValueError is a bug, too: a long run meets more than its user's mistakes. `place` is where
    the verb writes to, named if the system's error names no file. Of several ranks one says it.
    """
    voice = Voice()
    try:
        code = work()
        sys.stdout.flush()
        return code
    except RunStopped as stop:  # on all ranks at once
        if voice.rank == 0:
            print(f"composer-path {verb}: {stop}", file=sys.stderr, flush=True)
        return voice.leave(stop.code, agreed=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141  # as shells report a program whose reader left, such as `head`
        words = words_of_mistake(error, verb, place)
        words, code = words if words is None else printable_lines(words), MISTAKE
        if words is None and voice.ranks > 1 and lost_rank(error):
            words, code = LOST_WORDS, LOST
        if words is None and voice.ranks == 1:
            raise
        said = f"composer-path {verb}: {words}" if words is not None else format_exc()
        return voice.leave(voice.say(code if words is not None else 1, said), agreed=False)


def words_of_mistake(error: Exception, verb: str, place: str | None) -> str | None:
    """What a user did wrong, or what the system refused or ended, in a line; None for a bug."""
    if found := lost_worker(error):
        fix = "often for lack of memory: lower num_workers or prefetch_factor; the same command goes on"
        return f"loader: its worker (process {found[1]}) was ended by a signal: {found[2]}, {fix}"
    if type(error).__name__ == "DistStoreError" and "clients joined" in str(error):  # torch's, not imported here
        return f"ranks: all must come within trainer.dist_timeout, {error} Start the same command on all nodes"
    *_, (frame, _) = walk_tb(error.__traceback__)
    ours = str(frame.f_globals["__name__"]).startswith("composer_path.")
    if isinstance(error, OSError):
        if error.strerror is not None:
            return ": ".join(filter(None, (error.filename or place, error.strerror)))
        return str(error) if ours or verb != "train" else " ".join(str(error).split())
    named = type(error).__module__.startswith("composer_path.")  # our own errors are written for users
    return str(error) if named or (isinstance(error, ValueError) and (ours or verb != "train")) else None


def _nobody_reads() -> bool:
    """Whether the reader of stdout has left; what is still to be written to it is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def add_yaml(parser: argparse.ArgumentParser, **places: str) -> None:
    """A run's YAML, places and what each is for, and overrides, `options.words`."""
    for name, purpose in {"yaml": "of the run", **places}.items():
        parser.add_argument(name, metavar=name.upper(), help=purpose)
    add_no_imports(parser)
    purpose = "overrides, such as trainer.max_duration=2ep"
    parser.add_argument("words", metavar="key=value", nargs="*", default=[], help=purpose)


def add_no_imports(parser: argparse.ArgumentParser) -> None:
    """`options.no_imports`, and as `load_config` takes it `options.allowed_imports`."""
    purpose = "run no code of one's own; what needs some is refused by name"
    parser.add_argument("--no-imports", dest="allowed_imports", action="store_const", const=[], help=purpose)


def add_import(parser: argparse.ArgumentParser) -> None:
    """The code of one's own that a model or run needs, `options.imports`; nothing is imported that isn't given."""
    purpose = "a module, or a file such as ./my_parts.py, with code of one's own that it needs; may be repeated"
    parser.add_argument("--import", dest="imports", metavar="MODULE", action="append", default=[], help=purpose)
    parser.add_argument("--no-imports", action="store_true", help="run no code of one's own (as without --import)")


def import_given(options: argparse.Namespace) -> None:
    """Import what `add_import` was given; ValueError where it can't be, or both flags are."""
    if options.imports and options.no_imports:
        raise ValueError("--import and --no-imports: must not both be given; leave one away")
    if options.imports:
        from composer_path.own_parts.imports import import_parts

        import_parts(options.imports)


def add_workers(parser: argparse.ArgumentParser, what: str = "processes") -> None:
    """How much is done at once: `options.workers`."""
    purpose = f"{what} (default: as many as cores)"
    parser.add_argument("--workers", metavar="N", type=at_least_1, default=os.cpu_count() or 1, help=purpose)


def at_least_1(text: str) -> int:
    """A number of things of which there must be one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)
