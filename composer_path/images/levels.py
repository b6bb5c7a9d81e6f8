"""12 bits in 16: whether the pictures of a set whose levels stay below 4,096 were scaled when it was written.

A model that was trained on them must be shown others in the same way, so index.json says it: nothing of a set without
such pictures, as JPEGs are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

INDEX_KEY = "scale_levels"
ODDITY = "levels_below_4096"  # what such pictures are counted as where they are stored as they are


class LevelsError(ValueError):
    """Sets of a run whose dark 16-bit pictures were read in two ways, or in another way than the run says."""


def index_keys(scale_levels: bool, oddities: Mapping[str, int]) -> dict[str, bool]:
    """What an index says of a conversion with these options, which met these oddities."""
    return {INDEX_KEY: scale_levels} if scale_levels or oddities.get(ODDITY) else {}


def levels_in_index(index: bytes) -> bool | None:
    """Whether a set's dark 16-bit pictures were scaled; None where it has none, or doesn't know."""
    if f'"{INDEX_KEY}"'.encode() not in index:  # spares the reading of a long one
        return None
    found = json.loads(index).get(INDEX_KEY)
    if found is not None and not isinstance(found, bool):
        raise LevelsError(f"index.json: {INDEX_KEY} must be true or false, found {found!r:.40}; convert the set again")
    return found


def common_levels(indices: Mapping[str, bytes], wanted: bool | None) -> bool:
    """Whether dark 16-bit pictures are scaled in a run, from the index.json of each of its sets by place.

    `wanted` is what the run says; None leaves it to the sets.

    Raises:
        LevelsError: Two sets differ, or one from what is wanted.
    """
    found = {where: value for where, index in indices.items() if (value := levels_in_index(index)) is not None}
    kept = next((where for where, scaled in found.items() if not scaled), None)
    scaled = next((where for where, scaled in found.items() if scaled), None)
    what = "16-bit pictures with levels below 4,096"
    if kept is not None and scaled is not None:
        raise LevelsError(
            f"{scaled} was converted with --scale-levels, {kept} without, and holds {what}: one model can't be shown "
            "them in two ways; convert one of the two again"
        )
    if wanted is not None and found and wanted is (scaled is None):
        where, how = (scaled, "with") if kept is None else (kept, "without")
        raise LevelsError(
            f"scale_levels: found {str(wanted).lower()}, but {where} was converted {how} --scale-levels; leave it out"
        )
    return bool(scaled is not None if wanted is None else wanted)
