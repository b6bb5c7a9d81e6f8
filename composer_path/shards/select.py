"""Some of a set's samples as a set of its own: those that fit conditions, or as many drawn by chance."""

from __future__ import annotations

import itertools
import math
import operator
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from composer_path.shards.index import empty_place, new_set, publish_new
from composer_path.shards.mds import HASHES, ShardError, name_of
from composer_path.shards.summary import ShardSummary
from composer_path.shards.view import ShardView, StoredSample, over_shards, to_sample

# A condition may ask for these, for `meta.KEY`, and for the numbers of images and turns.
KEYS = ("id", "source", "organ", "stain", "magnification", "mpp", "patient", "slide")
# What these hold isn't repeated in the new set's data card.
_IDENTIFYING = ("id", "patient", "slide", "meta")

# Keys of a data card that hold for a part of the set, too. Not `fingerprint`: no conversion makes this set.
_KEPT = ("format", "format_version", "composer_path", "source", "options", "columns", "resized", "features")
_SIZE_LIMIT = 2**26
_CONDITION = re.compile(r"([A-Za-z_][\w.-]*)\s*(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
_ORDERS: dict[str, Any] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Condition:
    """`key=value`, `key!=value`, or an order of numbers such as `mpp<0.6`.

    `=` and `!=` take several values with `|` between them. A sample without the key fits only `!=`.
    """

    key: str
    operator: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition; an error never repeats a value."""
        match = _CONDITION.fullmatch(text.strip())
        if match is None:
            raise ValueError("a condition must look like stain=H&E, source!=cmu or mpp<0.6 (put it in quotes)")
        key, sign, value = match[1], match[2], match[3].strip()
        if key not in (*KEYS, "images", "turns") and not key.startswith("meta."):
            names = ", ".join((*KEYS, "images", "turns", "meta.KEY"))
            raise ValueError(f"a condition's key must be one of {names}, found {key!r}")
        if sign in _ORDERS and _number(value) is None:
            raise ValueError(f"{key}{sign}: must be followed by a number")
        return cls(key, sign, (value,) if sign in _ORDERS else tuple(part.strip() for part in value.split("|")))

    def fits(self, sample: StoredSample) -> bool:
        """Whether a sample is as the condition says."""
        found = self._value(sample)
        if self.operator in _ORDERS:
            number, limit = _number(found), _number(self.values[0])
            return number is not None and limit is not None and _ORDERS[self.operator](number, limit)
        equal = found is not None and any(_equal(found, value) for value in self.values)
        return equal == (self.operator == "=")

    def __str__(self) -> str:
        """The condition for a data card: without the value where that tells who is meant."""
        hidden = self.key.split(".")[0] in _IDENTIFYING
        return f"{self.key}{self.operator}{'...' if hidden else '|'.join(self.values)}"

    def _value(self, sample: StoredSample) -> Any:
        if self.key == "id":
            return sample.id
        if self.key in ("images", "turns"):
            return len(sample.images if self.key == "images" else sample.conversation.turns)
        value: Any = sample.metadata
        for part in self.key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def select_samples(
    view: ShardView,
    out: str,
    conditions: Sequence[Condition] = (),
    num_samples: int | None = None,
    seed: int = 0,
    workers: int = 1,
) -> ShardSummary:
    """Write the samples that fit every condition, or some of them drawn by chance, as a set of their own.

    Samples are copied bit for bit and keep their order. The new set has an index only when all of it is verified. The
    same seed draws the same samples of the same set.
    """
    place = empty_place(out)
    positions: Iterable[int] = range(len(view))
    if conditions:
        positions = itertools.chain.from_iterable(over_shards(_fitting, view, tuple(conditions), workers))
    positions = list(positions)
    if num_samples is not None:
        if not 0 < num_samples <= len(positions):
            raise ShardError(f"{view.place}: there are {len(positions)} samples to draw from, not {num_samples}")
        positions = sorted(random.Random(seed).sample(positions, num_samples))
    if not positions:
        raise ShardError(f"{view.place}: no sample fits; nothing was written")

    first = view.shards[0]
    hashes = [name for name in first["hashes"] if name in HASHES] or ["xxh64"]
    summary = ShardSummary()
    with new_set(place, first["size_limit"] or _SIZE_LIMIT, hashes) as writer:
        for sample, columns in _read(view, positions):
            writer.write(columns)
            summary.count(sample)
        card = _card(view, summary, conditions, num_samples, seed)
        publish_new(place, writer, card, view.index_keys)
    return summary


def _fitting(task: tuple[ShardView, int, tuple[Condition, ...]]) -> list[int]:
    view, number, conditions = task
    samples = view.samples(number)
    return [sample.position for sample in samples if all(condition.fits(sample) for condition in conditions)]


def _read(view: ShardView, positions: Sequence[int]) -> Iterator[tuple[StoredSample, dict[str, Any]]]:
    for number, inside in itertools.groupby(positions, view.shard_of):
        for position, columns in view.records(number, inside):
            yield to_sample(position, name_of(view.shards[number]), columns), columns


def _card(
    view: ShardView, summary: ShardSummary, conditions: Sequence[Condition], num_samples: int | None, seed: int
) -> dict[str, Any]:
    """The new set's data card: what still holds of the old one's, new counts, and how it was chosen."""
    chosen: dict[str, Any] = {"records": len(view), "conditions": [str(condition) for condition in conditions]}
    if num_samples is not None:
        chosen |= {"sampled": num_samples, "seed": seed}
    return {
        **{key: view.card[key] for key in _KEPT if key in view.card},
        "chosen_from": chosen,
        **{name: getattr(summary, name) for name in ("records", "images", "text_only", "turns", "image_bytes")},
        "sources": {source: {"records": count} for source, count in sorted(summary.sources.items())},
    }


def _equal(found: Any, value: str) -> bool:
    number = _number(found) if not isinstance(found, str) else None
    return _number(value) == number if number is not None else str(found) == value


def _number(value: Any) -> float | None:
    """A number or a text that is one; magnifications come as 20, "20" and "20x"."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(str(value).strip().lower().removesuffix("x"))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
