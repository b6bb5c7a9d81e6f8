"""What a set of shards holds, counted: sources, lengths of texts, sizes of images."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from composer_path.images.features import is_features
from composer_path.images.file import open_image
from composer_path.images.stored_square import is_square, square_of
from composer_path.printable import printable
from composer_path.records.rules import ImageError
from composer_path.shards.view import ShardView, StoredSample, over_shards


@dataclass
class ShardSummary:
    """What a set holds, counted; `str` gives it as a table. Holds no text, name or id."""

    records: int = 0
    images: int = 0
    text_only: int = 0  # records without an image
    turns: int = 0  # human and assistant
    sources: Counter[str] = field(default_factory=Counter)  # source -> samples; "" for those without one
    stains: Counter[str] = field(default_factory=Counter)  # stain -> samples, where one is given
    question_chars: Counter[int] = field(default_factory=Counter)  # characters of a human turn -> turns
    answer_chars: Counter[int] = field(default_factory=Counter)  # characters of an assistant turn -> turns
    image_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) -> images
    image_kinds: Counter[str] = field(default_factory=Counter)  # see `_look` -> images
    image_bytes: int = 0

    def count(self, sample: StoredSample) -> None:
        """Add a sample."""
        self.records += 1
        self.images += len(sample.images)
        self.text_only += not sample.images
        self.turns += len(sample.conversation.turns)
        self.sources[sample.source] += 1
        if sample.metadata.get("stain"):
            self.stains[str(sample.metadata["stain"])] += 1
        for turn in sample.conversation.turns:
            (self.question_chars if turn.role == "human" else self.answer_chars)[len(turn.text)] += 1
        for data in sample.images:
            self.image_bytes += len(data)
            kind, size = _look(data)
            self.image_kinds[kind] += 1
            if size is not None:
                self.image_sizes[size] += 1

    def add(self, other: ShardSummary) -> None:
        """Add what another part of the set holds."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def __str__(self) -> str:
        """One line for each figure, the most frequent values first."""
        rows = [(name.replace("_", "-"), getattr(self, name)) for name in ("records", "images", "text_only", "turns")]
        rows += [(f"  source {printable(name) or '(none)'}", count) for name, count in self.sources.most_common()]
        rows += [(f"  stain {printable(name)}", count) for name, count in self.stains.most_common()]
        for name, lengths in (("a question", self.question_chars), ("an answer", self.answer_chars)):
            rows.append((f"characters of {name}", _spread(lengths)))
        rows += [(f"images stored as {kind}", count) for kind, count in self.image_kinds.most_common()]
        shown = self.image_sizes.most_common(8)
        rows += [(f"  {width} x {height} pixels", count) for (width, height), count in shown]
        others = sum(self.image_sizes.values()) - sum(count for _, count in shown)
        rows += [("  other sizes", others)] if others else []
        rows += [("kB of an image, on average", f"{self.image_bytes / 1e3 / self.images:.1f}")] if self.images else []
        return "\n".join(f"{name:<36}{value}" for name, value in rows)


def summarize(view: ShardView, workers: int = 1, progress: Callable[[int], None] | None = None) -> ShardSummary:
    """Count what a set holds; every shard is read once, and `progress` called with their number after each."""
    total = ShardSummary()
    for part in over_shards(_summarize_shard, view, None, workers, progress):
        total.add(part)
    return total


def _summarize_shard(task: tuple[ShardView, int, None]) -> ShardSummary:
    view, number, _ = task
    summary = ShardSummary()
    for sample in view.samples(number):
        summary.count(sample)
    return summary


def _look(data: bytes) -> tuple[str, tuple[int, int] | None]:
    """An image's kind (file format, "resized", "features" or "unreadable") and size, from its header."""
    try:
        if is_features(data):
            return "features", None
        if is_square(data):
            size = square_of(data).image_size
            return "resized", (size, size)
        image = open_image(data)
        return str(image.format), image.size
    except ImageError:
        return "unreadable", None


def _spread(lengths: Counter[int]) -> str:
    """Least, median and greatest of a counted number."""
    if not lengths:
        return "none"
    ordered = sorted(lengths)
    passed = list(accumulate(lengths[length] for length in ordered))
    median = ordered[bisect_left(passed, (passed[-1] + 1) // 2)]
    return f"{ordered[0]} to {ordered[-1]}, median {median}"
