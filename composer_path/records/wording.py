"""What a record's text speaks of that a changed image would make wrong: directions, and sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# Words of place that turn with an image. "right" also means correct, and "top" a first place: a record more that keeps
# its image as it is costs nothing, a wrong answer does.
_DIRECTION = re.compile(
    r"\b(left|right|upper|lower|top\b|topmost|bottom|above|below|beneath|underneath|up\b|upward|down\b|downward"
    r"|north|south|east|west|arrow|clock|anticlock|counterclock|horizontal|vertical|corner|quadrant|rotat|mirror|orient"
    r"|diagonal|upside|sideways|superior|inferior|lateral|medial|anterior|posterior|cranial|caudal|proximal|distal"
    r"|ventral|dorsal)|o.?clock|[\u2190-\u21ff\u2794-\u27be]",
    re.IGNORECASE,
)
# Magnification, resolution, and lengths or areas; numbers with a unit.
_SIZE = re.compile(
    r"magnif|\bpower\b|(high|low).power|\bmpp\b|resolution|\bscale\b|scale.?bar|\bzoom|diameter|micromet|micron"
    r"|millimet|centimet|\bfield of view\b|\bhpf\b|\bobjective\b|\d\s*(x\b|\u00d7)|(\bx|\u00d7)\s*\d"
    r"|\d\s*[\u00b5\u03bcumcn]m\b|[\u00b5\u03bc]m",
    re.IGNORECASE,
)


class Wording(NamedTuple):
    """Whether a text speaks of directions, and of sizes; its fields are those of a batch."""

    names_direction: bool
    names_size: bool


def wording_of(conversation: Any) -> Wording:
    """What a shard's conversation speaks of: the turns, and the system message, as `Conversation.to_shard` wrote them.

    One that isn't of this form speaks of nothing; reading it says what is wrong.
    """
    text = "\n".join(_texts(conversation))
    return Wording(_DIRECTION.search(text) is not None, _SIZE.search(text) is not None)


def _texts(conversation: Any) -> Iterator[str]:
    if isinstance(conversation, str):
        yield conversation
    elif isinstance(conversation, dict):
        for value in conversation.values():
            yield from _texts(value)
    elif isinstance(conversation, list | tuple):
        for value in conversation:
            yield from _texts(value)
