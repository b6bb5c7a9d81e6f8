"""What a conversion wrote, as a table for people and as the data card `dataset.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from composer_path import __version__
from composer_path.conversion.identifiers import MAX_KEYS, OTHER_KEYS
from composer_path.conversion.partition import COUNTS, KEY_COUNTS, PartitionDone
from composer_path.conversion.spill import SpilledRows
from composer_path.images.plain_pixels import ODDITIES
from composer_path.shards.columns import COLUMN_MEANINGS, COLUMNS, FORMAT_VERSION
from composer_path.shards.index import IMAGE_HASHES_NAME
from composer_path.storage.places import Bucket, Folder

# More are counted together: a source should be a data set's name, and a name for each record is none.
_NUM_SOURCES = 1000
# In the table; the data card has them all.
_NUM_KEYS_SHOWN = 20


@dataclass
class ConvertSummary:
    """What a conversion wrote; `str` gives it as a table. Holds no text, name or id."""

    records: int = 0
    images: int = 0  # one that several records show counts each time
    text_only: int = 0  # records without an image
    turns: int = 0  # human and assistant
    without_tag: int = 0  # records with one image and no tag; the image stands before the first question
    dropped_turns: int = 0  # leading assistant turns
    image_bytes: int = 0  # of the images as stored
    repeated_images: int = 0  # that equal an earlier one byte for byte
    left_out: dict[str, int] = field(default_factory=dict)  # why a row isn't wanted -> rows
    rejected: int = 0  # records left out
    rejected_by_rule: dict[str, int] = field(default_factory=dict)  # rule -> records that break it
    oddities: dict[str, int] = field(default_factory=dict)  # what is odd about images -> how many
    unknown_keys: dict[str, int] = field(default_factory=dict)  # key that nothing reads -> records that have it
    unknown_turn_keys: dict[str, int] = field(default_factory=dict)  # likewise of turns -> records
    kept_meta_keys: dict[str, int] = field(default_factory=dict)  # key in `meta` that is stored as given -> records
    hashed_meta_keys: dict[str, int] = field(default_factory=dict)  # key in `meta` whose value is hashed -> records
    sources: dict[str, dict[str, int]] = field(default_factory=dict)  # source, "" for none -> the first seven counts
    shards: int = 0  # files
    bytes: int = 0  # of the shard files
    resumed: int = 0  # partitions that an earlier run had converted
    part: str | None = None  # "1/4" if this was one part of several and there is no index yet
    lengths: list[str] = field(default_factory=list)  # files with the lengths of samples
    lengths_left_out: int = 0  # such files that aren't there, as a part was converted without
    rejected_file: Path | None = None  # where the rejected records are listed, if any were
    mapping_file: Path | None = None  # where hashes lead back to values, unless identifiers were kept

    def add(self, done: PartitionDone) -> None:
        """Add what a partition's marker says."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + done.counts[name])
        for source, counts in done.sources.items():
            known = source in self.sources or len(self.sources) < _NUM_SOURCES
            into = self.sources.setdefault(source if known else "(others)", dict.fromkeys(COUNTS, 0))
            for name in COUNTS:
                into[name] += counts.get(name, 0)
        for name in KEY_COUNTS:
            counts = Counter(getattr(self, name))
            for key, count in sorted(getattr(done, name).items()):  # as a marker has them, whoever made it
                counts[key if key in counts or len(counts) < MAX_KEYS else OTHER_KEYS] += count
            setattr(self, name, dict(counts))
        self.left_out = dict(sorted((Counter(self.left_out) + Counter(done.left_out)).items()))
        self.oddities = dict(sorted((Counter(self.oddities) + Counter(done.oddities)).items()))
        self.shards += len(done.shards)
        self.bytes += sum(shard["raw_data"]["bytes"] for shard in done.shards)

    def counts(self) -> dict[str, Any]:
        """Return what the data card holds of it."""
        odd = ("repeated_images", "left_out", "rejected", "rejected_by_rule", "oddities", *KEY_COUNTS)
        return {name: getattr(self, name) for name in (*COUNTS, *odd, "sources", "shards", "bytes")}

    def __str__(self) -> str:
        """One line for each figure; those about oddities only when there are any."""
        rows: list[tuple[str, object]] = [("records", self.records), ("images", self.images)]
        rows += [("text-only records", self.text_only), ("turns", self.turns)]
        odd = {
            "images that equal an earlier one": self.repeated_images,
            "records with one image and no tag": self.without_tag,
            "leading assistant turns dropped": self.dropped_turns,
            "records rejected": self.rejected,
        }
        rows += [(name, count) for name, count in odd.items() if count]
        rows += [(f"  {rule}", count) for rule, count in self.rejected_by_rule.items()]
        rows += [(ODDITIES[name], count) for name, count in self.oddities.items()]
        rows += [(f"left out by {why}", f"{count} rows") for why, count in self.left_out.items()]
        for name, words in KEY_COUNTS.items():
            keys = Counter(getattr(self, name)).most_common()
            rows += [(f"{words} {key}", f"in {count} records") for key, count in keys[:_NUM_KEYS_SHOWN]]
            rows += [(f"{words}: others", len(keys) - _NUM_KEYS_SHOWN)] if len(keys) > _NUM_KEYS_SHOWN else []
        rows += [("shards", self.shards), ("MB", f"{self.bytes / 1e6:.1f}")]
        rows += [("partitions taken over", self.resumed)] if self.resumed else []
        rows += [("lengths of samples in", file) for file in self.lengths]
        missing = "not written: a part was converted without --lengths; composer-path lengths YAML measures them"
        rows += [("lengths of samples", missing)] * self.lengths_left_out
        rows += [("rejected records listed in", self.rejected_file)] if self.rejected_file else []
        rows += [("hashes lead back through", self.mapping_file)] if self.mapping_file else []
        if self.part is not None:
            rows += [("part", f"{self.part}; when all are there: composer-path merge OUT")]
        return "\n".join(f"{name:<35} {value}" for name, value in rows)


def card_before(options: dict[str, Any], source: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """Return what of the data card is known before the conversion has run."""
    columns = {name: {"encoding": COLUMNS[name], "meaning": COLUMN_MEANINGS[name]} for name in COLUMNS}
    versions = {"format": "composer_path", "format_version": FORMAT_VERSION, "composer_path": __version__}
    card = {**versions, "fingerprint": fingerprint, "source": source, "options": options, "columns": columns}
    return card if options["resized"] is None else {**card, "resized": options["resized"]}


def rejected_by_rule(dones: Iterable[PartitionDone]) -> tuple[int, dict[str, int]]:
    """Count rejected records, and those that break each rule, from the partitions' markers."""
    rules: Counter[str] = Counter()
    num_records = 0
    for done in dones:
        broken = {(problem[0], problem[2]) for problem in done.problems}
        num_records += len({position for position, _ in broken})
        rules.update(rule for _, rule in broken)
    return num_records, dict(rules.most_common())


def count_repeated_images(place: Folder | Bucket, dones: Iterable[PartitionDone]) -> int:
    """Count images that are equal to an earlier one, byte for byte as stored."""
    rows = SpilledRows()
    for done in dones:
        if any(file["name"] == IMAGE_HASHES_NAME for file in done.files):
            for hash in np.frombuffer(place.read(f"{done.name}/{IMAGE_HASHES_NAME}"), "<u8").tolist():
                rows.add(hash, hash.to_bytes(8, "little"))
    counts = (np.frombuffer(group, "<u8") for group in rows.groups())
    repeated = sum(len(hashes) - len(np.unique(hashes)) for hashes in counts)
    rows.close()
    return repeated
