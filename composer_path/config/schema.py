"""What a section of a YAML is: keys with their types, rules and defaults, read from the signatures that get them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from composer.core import Time
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_path.config.rules import check_interval, check_moment
from composer_path.config.types import choices_of, fits, mentions, resolve_annotation


class NoDefault(Enum):
    """Stands in place of a default: the key must be given, or it has one that a YAML can't say (an object)."""

    REQUIRED = "required"
    ABSENT = "absent"


REQUIRED, ABSENT = NoDefault
SAYABLE = (type(None), bool, int, float, str, list)  # what a YAML can say of a default


@dataclass(frozen=True)
class Key:
    """One value: its type, its default and further rules, which hold for each item where it is a list."""

    annotation: Any
    default: Any = REQUIRED
    at_least: int | None = None
    at_most: int = 2**63 - 1
    check: Callable[[Any], None] | None = None  # of what isn't null; raises ValueError


@dataclass(frozen=True)
class Section:
    """A mapping of known keys."""

    keys: Mapping[str, Key | Section | Choice]
    default: Any = None  # or {}, or a `NoDefault`; null means {} too, unless it is None
    refused: Mapping[str, str] = field(default_factory=dict)  # what it may not hold, and what to do instead
    members: Section | None = None  # what stands under any other key, where names are free
    open: bool = False  # other keys are passed on unchecked


@dataclass(frozen=True)
class Choice:
    """A mapping whose key `selector` says which other keys there are: `{name: adamw, …}`."""

    selector: str
    sections: Mapping[Any, Section]
    default: Any = None
    selected: Any = None  # where the selector is left out
    refused: Mapping[Any, str] = field(default_factory=dict)  # words that it may not be, and why
    otherwise: Section | None = None  # of all other words, which are its own key's affair

    def section(self, selected: Any) -> Section | None:
        """The section of a name; None where there is none."""
        found = (section for name, section in self.sections.items() if fits(selected, Literal[name]))
        return next(found, self.otherwise)


Node = Key | Section | Choice


def join(path: str, key: Any) -> str:
    """The path of a key below another."""
    return f"{path}.{key}" if path else str(key)


def complete(config: DictConfig, whole: Section | Choice, path: str = "") -> Iterator[str]:
    """Fill in what a section, and those in it, leave out; yields a line for each that can't be filled in."""
    given: Any = OmegaConf.to_container(config, resolve=False)
    section: Section | None
    if isinstance(whole, Section):
        section = whole
    else:
        if given.get(whole.selector) is None and whole.selected is not None:
            config[whole.selector] = whole.selected
        section = whole.section(OmegaConf.select(config, whole.selector, throw_on_resolution_failure=False))
    if section is None:
        return
    for name, node in section.keys.items():
        if name not in given and not isinstance(node.default, NoDefault):
            config[name] = node.default
        elif given.get(name, "") is None and not isinstance(node, Key) and node.default in ({}, ABSENT):
            config[name] = {}
    for key in config:
        part, where = section.keys.get(str(key), section.members), join(path, key)
        if part is None or isinstance(part, Key):
            continue
        try:
            child = config[key]
        except OmegaConfBaseException:
            continue  # said when it is filled in
        if isinstance(child, dict):  # made by a resolver, anew each time
            yield f"{where}: found {given[key]}; a section is written out, or another section's: ${{name}}"
        elif isinstance(child, DictConfig):
            yield from complete(child, part, where)


def section_of(
    *functions: Callable[..., Any],
    leave_out: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
    changes: Mapping[str, Section | Choice | dict[str, Any]] | None = None,
    default: Any = None,
) -> Section:
    """The keywords of a function or class as a section.

    Args:
        *functions: The constructor, and those to which it passes its further keywords on; the first to have one counts.
        leave_out: Keywords that the run itself supplies.
        refused: Keywords that another key of the YAML says, and which.
        changes: Keys that are sections themselves, or in which fields of `Key` a key differs from the signature.
        default: See `Section`.
    """
    changes, refused = changes or {}, refused or {}
    keys: dict[str, Node] = {}
    kinds: set[Any] = set()
    for function in functions:
        call = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
        parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
        kinds = {parameter.kind for parameter in parameters}
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in (*leave_out, *refused, *keys):
                continue
            change = changes.get(p.name, {})
            if isinstance(change, dict):
                more = {"default": REQUIRED if p.default is p.empty else p.default, **change}
                annotation = more.pop("annotation", None) or resolve_annotation(p, call)
                keys[p.name] = key_of(p.name, annotation, **more)
            else:
                keys[p.name] = change
    # Composer's base classes take (*args, **kwargs) and drop them: their heirs without an __init__ have no keywords.
    passes_on = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
    return Section(keys, default, refused, open=passes_on)


def key_of(name: str, annotation: Any, default: Any, **fields: Any) -> Key:
    """A key of a constructor; times, some of which are called text, are checked as what their name says."""
    if "off" in (words := choices_of(annotation)):
        annotation = Literal[(*words, False)]  # YAML reads a bare off as false
    repeated = name.endswith(("interval", "half_life"))
    text = mentions(annotation, str) and (repeated or name.endswith(("_start", "_end")))
    rules: dict[str, Any] = {}
    if text or mentions(annotation, Time):
        rules["check"] = check_interval if repeated else check_moment
    elif name.endswith(("interval", "window_size")):
        rules["at_least"] = 1
    plain = list(default) if isinstance(default, tuple) else default
    elsewhere = isinstance(plain, str) and plain.startswith("${")
    sayable = type(plain) in SAYABLE and plain not in (math.inf, -math.inf) and (elsewhere or fits(plain, annotation))
    return Key(annotation, plain if sayable or isinstance(plain, NoDefault) else ABSENT, **rules | fields)
