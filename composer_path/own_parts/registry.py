"""The classes of one's own that are known now: those of the YAML that was read last, and those imported since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "algorithms",
    "callbacks",
    "loggers",
    "optimizers",
    "schedulers",
    "projectors",
    "vision_encoders",
    "templates",
    "layouts",
    "metrics",
]


@dataclass(frozen=True)
class OwnPart:
    """A class of one's own.

    Attributes:
        kind: What it is, which is also the group of its entry point.
        name: What a YAML calls it.
        cls: The class.
        source: What is imported to have it: a module, or the name of a file.
    """

    kind: Kind
    name: str
    cls: type
    source: str


_known: dict[tuple[Kind, str], OwnPart] = {}
_version = 0


def version() -> int:
    """A number that is another one whenever other parts are known."""
    return _version


def own_classes(kind: Kind) -> dict[str, Any]:
    """The classes of a kind by their names."""
    return {part.name: part.cls for part in _known.values() if part.kind == kind}


def all_parts() -> list[OwnPart]:
    """All that are known."""
    return list(_known.values())


def set_parts(parts: Iterable[OwnPart]) -> None:
    """Know these, and no others."""
    global _known, _version
    before, _known = _known, {(part.kind, part.name): part for part in parts}
    _version += _known != before


def sources_of(**names: str | None) -> list[str]:
    """What must be imported to have the parts of these kinds and names; nothing for those that aren't one's own."""
    found = [_known[kind, name].source for kind, name in names.items() if (kind, name) in _known]  # type: ignore[index]
    return list(dict.fromkeys(found))


def check_sources(where: str, content: Mapping[str, Any]) -> None:
    """Refuse what a file asks to be imported and isn't; a file never has anything imported.

    Raises:
        ValueError: It names what is missing.
    """
    needed = content.get("imports", [])
    if not isinstance(needed, list) or not all(isinstance(name, str) for name in needed):
        raise ValueError(f"'{where}': imports must be a list of names; export the model again")
    known = {part.source for part in _known.values()}
    if missing := [name[:200] for name in needed if name not in known]:
        raise ValueError(
            f"'{where}': needs code of one's own from {', '.join(map(repr, missing))}, which isn't imported by reading "
            f"a model; if you trust it, give --import with its place (in Python composer_path.import_parts)"
        )
