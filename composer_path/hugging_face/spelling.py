"""How text passes through a chat template's one string and comes out again as pieces that are encoded one by one.

Three characters of Unicode's private use carry what a string can't say. Only where they are needed are there any: a
plain question is plain text, for any program.
"""

from __future__ import annotations

import re
from collections.abc import Collection

ESCAPE = "\ue000"  # the next character is meant as it is
BORDER = "\ue001"  # tokens never reach across
NOTHING = "\ue002"  # breaks up what would else be a special token, and keeps blanks at a content's ends
_CONTROLS = re.compile(f"{ESCAPE}(.)|{BORDER}|{NOTHING}", re.DOTALL)
# Beyond so many special tokens a template looks for what they begin with.
MOST = 24


def pieces_of(text: str) -> list[str]:
    """Text between borders, as it is meant."""
    pieces, at = [""], 0
    for found in _CONTROLS.finditer(text):
        pieces[-1] += text[at : found.start()] + (found[1] or "")
        if found[0] == BORDER:
            pieces.append("")
        at = found.end()
    pieces[-1] += text[at:]
    return pieces


def spelled_out(special_tokens: Collection[str]) -> list[tuple[str, str]]:
    """What to replace in a content, one after the other, so that it never forms a special token.

    Raises:
        ValueError: A special token of one character, which nothing can break up.
    """
    if short := [token for token in special_tokens if len(token) < 2]:
        raise ValueError(
            f"tokenizer: has a special token of one letter, {short[0]!r}, which a text may hold; rename it"
        )
    found = sorted(set(special_tokens))
    if len(found) > MOST:
        found = sorted({token[:2] for token in found})
    controls = [(one, ESCAPE + one) for one in (ESCAPE, BORDER, NOTHING)]
    return controls + [(token, token[0] + NOTHING + token[1:]) for token in found]
