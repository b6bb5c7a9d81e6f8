"""Patterns that pick weights by name: `projector`, `language_model.layers.[24-31].*`, `vision_encoder.blocks.*.attn`.

`*` stands for any letters, dots too; `[24-31]` and `[0,2,5-7]` for each of these numbers. What is named is picked with
all below it. Names are the module's own; what libraries put between may be left out: `language_model.layers` is its
`model.layers`, `vision_encoder.blocks` its `trunk.blocks`.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

ModuleName = Literal["vision_encoder", "projector", "language_model"]
MODULES: tuple[ModuleName, ...] = get_args(ModuleName)
MOST_NUMBERS = 10_000  # a slip of the keyboard shouldn't look for a billion blocks
_NUMBERS = r"\[\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*\]"
_WHOLE = re.compile(rf"(?:[\w*-]|{_NUMBERS})+(?:\.(?:[\w*-]|{_NUMBERS})+)*", re.ASCII)


def module_of(pattern: str) -> str:
    """The module that a pattern's weights belong to."""
    return pattern.partition(".")[0]


def modules_of(patterns: Iterable[str]) -> list[str]:
    """The modules that patterns touch, in the order in which they are named."""
    return list(dict.fromkeys(map(module_of, patterns)))


def learning_modules(model: Mapping[str, Any]) -> list[str]:
    """The modules of a YAML's `model` section in which something learns: its weights, or adapters beside them."""
    return modules_of([*model["trainable"], *(name for name, own in (model.get("lora") or {}).items() if own)])


def check_pattern(pattern: str) -> None:
    """Refuse, before there is a model, what is no pattern of one; ValueError."""
    if (name := module_of(pattern)) not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1)
        fix = f"did you mean {near[0]}?" if near else f"it must be, or begin with, one of {', '.join(MODULES)}"
        raise ValueError(f"found the text '{pattern}'; {fix}")
    if not _WHOLE.fullmatch(pattern):
        fix = "write names, dots, * and numbers in brackets, as in language_model.layers.[24-31].*"
        raise ValueError(f"found '{pattern}', which is no pattern; {fix}")
    numbers = 1
    for _, *ranges in _pieces(pattern):
        for first, last in ranges:
            if last < first:
                raise ValueError(f"found '{pattern}'; {first}-{last} counts down: write {last}-{first}")
        numbers *= max(1, sum(last - first + 1 for first, last in ranges))
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"found '{pattern}', which names more than {MOST_NUMBERS:,} modules; write fewer numbers, or *"
        )


def pick(model: nn.Module, pattern: str, where: str) -> set[str]:
    """Names of the parameters that a pattern picks, tied ones under each of their names.

    Raises:
        ValueError: No pattern, or it, or one of its numbers, is nowhere in the model; `where` is the key it came from.
    """
    try:
        check_pattern(pattern)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    names = _names(model, module_of(pattern))
    found: set[str] = set()
    choices = []
    for text, *ranges in _pieces(pattern):
        numbers = [str(number) for first, last in ranges for number in range(first, last + 1)]
        choices.append(numbers or [text])
    for words in itertools.product(*choices):
        one = "".join(words)
        expression = _expression(one.removesuffix(".*"))
        picked = {name for name, shown in names.items() if any(map(expression.fullmatch, shown))}
        if not picked:
            raise ValueError(f"{where}: {_nowhere(pattern, one, names)}")
        found |= picked
    return found


def _expression(text: str) -> re.Pattern[str]:
    """What stands between stars is taken where it first comes (atomic groups): no number of stars takes long."""
    first, *rest = map(re.escape, text.split("*"))
    middle = "".join(f"(?>.*?{part})" for part in rest[:-1])
    last = f".*{rest[-1]}" if rest else ""
    return re.compile(rf"{first}{middle}{last}(\..*)?")


def _pieces(pattern: str) -> list[tuple[Any, ...]]:
    """Text between brackets as `(text,)`, numbers in brackets as `(text, (first, last), ...)`."""
    pieces: list[tuple[Any, ...]] = []
    for text in re.split(f"({_NUMBERS})", pattern):
        ranges = []
        for item in text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else ():
            first, _, last = item.partition("-")
            ranges.append((int(first), int(last or first)))
        pieces.append((text, *ranges))
    return pieces


def _names(model: nn.Module, module: str) -> dict[str, tuple[str, ...]]:
    """A module's parameters: their whole names, and how a pattern may write each."""
    part: Any = getattr(model, module)
    shorter: list[tuple[str, str]] = []  # what stands in the model, what a pattern may write
    if module == "language_model":
        shorter.append((f"{module}.{part.base_model_prefix}.", f"{module}."))
    elif module == "vision_encoder":
        places = {id(child): name for name, child in model.named_modules()}
        blocks = enumerate(part.blocks)
        shorter += [(f"{places[id(block)]}.", f"{module}.blocks.{number}.") for number, block in blocks]
        shorter.append((f"{module}.trunk.", f"{module}."))
    found = {}
    for name, _ in part.named_parameters(prefix=module, remove_duplicate=False):
        short = (new + name.removeprefix(old) for old, new in shorter if name.startswith(old))
        found[name] = (name, *short)
    return found


def _nowhere(pattern: str, one: str, names: dict[str, tuple[str, ...]]) -> str:
    """Why nothing was picked, with the nearest name that there is."""
    wanted = one.removesuffix(".*")
    depth = wanted.count(".") + 1
    known: Sequence[str] = sorted({".".join(s.split(".")[:depth]) for shown in names.values() for s in shown})
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
    whole = f" of '{pattern}'" if one != pattern else ""
    fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(known[:6])}"
    return f"'{one}'{whole} matches no weight; {fix}"
