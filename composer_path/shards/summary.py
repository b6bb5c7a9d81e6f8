"""What a set of shards holds, counted: sources, lengths of texts, sizes of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from composer_path.images.features import is_features
from composer_path.images.file import open_image
from composer_path.images.square import is_square, square_of
from composer_path.parallel import in_processes
from composer_path.records.rules import ImageError
from composer_path.shards.view import ShardView, StoredSample


@dataclass
class ShardSummary:
    """What a set holds, counted; `str` gives it as a table. Holds no text, name or id.

    Attributes:
        records: Samples.
        images: Images in them.
        text_only: Samples without an image.
        turns: Turns, human and assistant.
        sources: Source -> samples; "" for those without one.
        stains: Stain -> samples, where one is given.
        question_chars: Characters of a human turn -> turns.
        answer_chars: Characters of an assistant turn -> turns.
        image_sizes: (width, height) -> images.
        image_kinds: File format, "resized" or "features" -> images; "unreadable" for none of them.
        image_bytes: Bytes of all images.
    """

    records: int = 0
    images: int = 0
    text_only: int = 0
    turns: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    stains: Counter[str] = field(default_factory=Counter)
    question_chars: Counter[int] = field(default_factory=Counter)
    answer_chars: Counter[int] = field(default_factory=Counter)
    image_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    image_kinds: Counter[str] = field(default_factory=Counter)
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
        rows += [(f"  source {name or '(none)'}", count) for name, count in self.sources.most_common()]
        rows += [(f"  stain {name}", count) for name, count in self.stains.most_common()]
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
    """Count what a set holds; every shard is read once. `progress` is called with the number of shards after each.

    Raises:
        ShardError: A shard can't be read.
    """
    total = ShardSummary()
    tasks = [(view, number) for number in range(len(view.shards))]
    for number, part in enumerate(in_processes(_summarize_shard, tasks, workers, fork=True), start=1):
        total.add(part)
        if progress is not None:
            progress(number)
    return total


def _summarize_shard(task: tuple[ShardView, int]) -> ShardSummary:
    view, number = task
    summary = ShardSummary()
    for sample in view.samples(number):
        summary.count(sample)
    return summary


def _look(data: bytes) -> tuple[str, tuple[int, int] | None]:
    """An image's kind and size, from its header."""
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
    half, passed = (sum(lengths.values()) + 1) // 2, 0
    for length in sorted(lengths):
        passed += lengths[length]
        if passed >= half:
            break
    return f"{min(lengths)} to {max(lengths)}, median {length}"
