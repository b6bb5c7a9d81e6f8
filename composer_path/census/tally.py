"""What is counted of records and pictures: by partition in its own process, then added up.

Nothing of it is text of a conversation, a file name or an identifier: texts are compared by their hashes, records are
named by their places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from composer_path.census.thumbnail import Picture, Thumbnail, picture_of
from composer_path.conversion.identifiers import count_keys
from composer_path.conversion.image_source import StoredImage
from composer_path.conversion.partition import KEY_COUNTS, keys_of, source_of
from composer_path.conversion.record_file import RawRecord
from composer_path.layouts.reading import LeftOut
from composer_path.records.conversation import Conversation
from composer_path.records.rules import RecordError

NUM_THUMBNAILS = 48
# A hash, the record's position, and what it is the hash of (characters of an answer).
SEEN = np.dtype([("hash", "<u8"), ("position", "<i8"), ("size", "<i8")])
# What is looked for twice, and what a histogram counts.
REPEATABLE = ("answers", "conversations", "pictures")
HISTOGRAMS = {
    "turns": "turns a record",
    "question": "characters of a question",
    "answer": "characters of an answer",
    "images": "images a record",
    "width": "width of a picture (pixels)",
    "height": "height of a picture (pixels)",
    "brightness": "mean brightness of a picture (0 black, 255 white)",
    "mpp": "micrometres a pixel, times 100",
    "tokens": "tokens a record",
}


@dataclass(frozen=True)
class Tokens:
    """Tokens of a record as a training would read it."""

    whole: int
    truncated: bool  # something is cut away at the training's limit
    unusable: bool  # no answer is left there, or the template can't express it


@dataclass
class Tally:
    """Counts of some records."""

    records: int = 0
    refused: int = 0
    without_image: int = 0
    images: int = 0
    image_bytes: int = 0  # as they would be stored
    truncated: int = 0
    unusable: int = 0
    rules: Counter[str] = field(default_factory=Counter)  # rule -> records that break it
    sources: dict[str, Counter[str]] = field(default_factory=dict)  # source, "" for none -> records, images, refused
    layouts: Counter[str] = field(default_factory=Counter)  # layout, "" for none -> records
    left_out: Counter[str] = field(default_factory=Counter)  # condition -> rows that it leaves out
    oddities: Counter[str] = field(default_factory=Counter)  # of pictures, see `plain_pixels.ODDITIES`
    keys: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in KEY_COUNTS})
    histograms: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in HISTOGRAMS})
    seen: dict[str, list[tuple[int, int, int]]] = field(default_factory=lambda: {name: [] for name in REPEATABLE})
    thumbnails: list[Thumbnail] = field(default_factory=list)

    def add(
        self,
        record: RawRecord,
        conversation: Conversation | None,
        stored: Sequence[StoredImage],
        problems: Sequence[RecordError],
        tokens: Tokens | None,
    ) -> None:
        """Count a record; of one that would be refused, why and where it is from."""
        if isinstance(record.value, LeftOut):
            self.left_out[record.value.why] += 1
            return
        self.records += 1
        self.layouts[record.layout] += 1
        counts = self.sources.setdefault(source_of(conversation) if conversation is not None else "", Counter())
        counts["records"] += 1
        for rule in {problem.rule for problem in problems}:
            self.rules[rule] += 1
        for name, keys in keys_of(record, hashed=True).items():
            count_keys(self.keys[name], keys)
        if problems or conversation is None:
            self.refused += 1
            counts["refused"] += 1
            return
        self._add_texts(record, conversation)
        if tokens is not None:
            self.truncated += tokens.truncated
            self.unusable += tokens.unusable
            self._count("tokens", tokens.whole)
        self.without_image += not stored
        self.images += len(stored)
        self.image_bytes += sum(len(image.data) for image in stored)
        counts["images"] += len(stored)
        self._count("images", len(stored))
        for index, image in enumerate(stored):
            self._add_picture(record, index, image, picture_of(image.data))

    def _add_texts(self, record: RawRecord, conversation: Conversation) -> None:
        position = record.position or 0
        self._count("turns", len(conversation.turns))
        for turn in conversation.turns:
            self._count("question" if turn.role == "human" else "answer", len(turn.text))
            if turn.role == "assistant":
                words = " ".join(turn.text.lower().split())
                self.seen["answers"].append((xxhash.xxh64_intdigest(words), position, len(turn.text)))
        whole = "\0".join(f"{turn.role}\0{turn.text}" for turn in conversation.turns)
        names = "\0".join(map(str, conversation.images))  # one question about many pictures is no repetition
        self.seen["conversations"].append((xxhash.xxh64_intdigest(f"{whole}\0\0{names}"), position, len(whole)))
        mpp = conversation.metadata.get("mpp")
        if isinstance(mpp, int | float):
            self._count("mpp", round(100 * mpp))

    def _add_picture(self, record: RawRecord, index: int, image: StoredImage, picture: Picture) -> None:
        position = record.position or 0
        self.seen["pictures"].append((picture.hash, position, len(image.data)))
        self._count("width", picture.width)
        self._count("height", picture.height)
        self._count("brightness", round(picture.brightness))
        self.oddities.update(image.oddities)
        rank = xxhash.xxh64_intdigest(f"{position} {index}")
        if len(self.thumbnails) < NUM_THUMBNAILS or rank < self.thumbnails[-1].rank:
            self._keep([*self.thumbnails, picture.thumbnail(rank, record.where, index)])

    def _keep(self, thumbnails: list[Thumbnail]) -> None:
        """The same few of all pictures, however records are divided over processes."""
        self.thumbnails = sorted(thumbnails, key=lambda one: one.rank)[:NUM_THUMBNAILS]

    def _count(self, name: str, value: int) -> None:
        self.histograms[name][bin_of(value)] += 1

    def merge(self, other: Tally) -> None:
        """Add another's counts; what was seen is handed over by `Repetitions` instead, as it grows with the records."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            if isinstance(value, Counter):
                own.update(value)
            elif isinstance(value, int):
                setattr(self, name, own + value)
        for name, bins in other.histograms.items():
            self.histograms[name].update(bins)
        for name, keys in other.keys.items():
            self.keys[name].update(keys)
        for source, found in other.sources.items():
            self.sources.setdefault(source, Counter()).update(found)
        self._keep([*self.thumbnails, *other.thumbnails])


def bin_of(value: int) -> int:
    """The lower end of a value's bin: each number up to 8, from there on four bins between two powers of 2."""
    step = 1 << max(0, value.bit_length() - 3)
    return value - value % step
