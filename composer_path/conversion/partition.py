"""Converts one partition: the same function for one process, many processes, many machines and Spark.

Records are checked, their images read, and the good ones written to `part-00000/`. When all its files have been
verified, `done.json` is written there: counts, problems and the files with sizes and hashes; no text, no id.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int32

from composer_path.conversion.identifiers import KeyedHashes, count_keys, keys_of_meta
from composer_path.conversion.image_source import ImageSource, StoredImage
from composer_path.conversion.input_file import InputFile
from composer_path.conversion.input_scan import Partition
from composer_path.conversion.options import ConvertOptions
from composer_path.conversion.record_file import RawRecord
from composer_path.layouts.reading import LeftOut
from composer_path.parallel import Report, in_threads
from composer_path.records.conversation import Conversation, id_of
from composer_path.records.image_tags import read_image_tags
from composer_path.records.key_names import shown_key
from composer_path.records.rules import RECORD_KEYS, TURN_KEYS, RecordError, problems_of
from composer_path.records.slide_region import SlideRegion
from composer_path.shards.columns import COLUMNS, packed_parts
from composer_path.shards.index import DONE_NAME, IMAGE_HASHES_NAME, Part, require_own
from composer_path.shards.writer import ShardWriter, verify
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Bucket, Folder, is_remote, open_place

COUNTS = ("records", "images", "text_only", "turns", "without_tag", "dropped_turns", "image_bytes")
# Counts of records by names of keys, and what a table calls them.
KEY_COUNTS = {
    "unknown_keys": "ignored key",
    "unknown_turn_keys": "ignored turn key",
    "kept_meta_keys": "kept in meta:",
    "hashed_meta_keys": "hashed in meta:",
}

_MAX_SOURCE_LENGTH = 80
# Requests to a bucket wait for the network, so many go at once.
_BUCKET_THREADS = 16

Counts = Int32[np.ndarray, "_ 3"]  # tokens, answer tokens and images

# A record without its content, its id, and what is wrong with it.
Problem = tuple[RawRecord, str | None, RecordError]
# A record, what it says and shows if it can be read, what is wrong with it, and the stamps of its images' files.
Loaded = tuple[RawRecord, Conversation | None, list[StoredImage], list[RecordError], bytes]


@dataclass(frozen=True)
class ConvertJob:
    """What is the same for every partition of a conversion."""

    data: str
    images: str
    out: str
    options: ConvertOptions
    fingerprint: str  # hash of the input and of every option that shapes the shards
    key: bytes | None = field(repr=False)  # None to keep identifiers plainly
    threads: int = 1  # for images, in each process
    measures: tuple[Callable[[Conversation], tuple[int, int, int]], ...] = ()  # what counts each sample's lengths
    check_only: bool = False  # write nothing, only list problems
    published: str | None = None  # where partitions may be taken over from, too, and then stay

    def writes_on(self, problems: list[Problem]) -> bool:
        """Whether there is still something to write of a partition in which these problems were found."""
        return not self.check_only and not (self.options.on_error == "fail" and problems)


@dataclass(kw_only=True)
class PartitionDone(Part):
    """A partition's marker: counts, problems and files; no text, no id."""

    fingerprint: str
    stamp: str = ""  # hash of size and time of every image
    counts: dict[str, int] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    sources: dict[str, dict[str, int]] = field(default_factory=dict)  # the same counts for the records of each source
    oddities: dict[str, int] = field(default_factory=Counter)  # what is odd about images -> how many
    unknown_keys: dict[str, int] = field(default_factory=Counter)  # key that nothing reads -> records that have it
    left_out: dict[str, int] = field(default_factory=Counter)  # why a row isn't wanted -> rows
    unknown_turn_keys: dict[str, int] = field(default_factory=Counter)  # likewise of turns
    kept_meta_keys: dict[str, int] = field(default_factory=Counter)  # key in `meta` that is stored as given -> records
    hashed_meta_keys: dict[str, int] = field(default_factory=Counter)  # key in `meta` whose value is hashed -> records
    problems: list[list[Any]] = field(default_factory=list)  # position, line, rule, found, fix and place of each


@dataclass
class PartitionResult:
    """What became of a partition."""

    partition: Partition
    done: PartitionDone | None  # None if it wasn't written
    problems: list[Problem]
    values: dict[tuple[str, str], str]  # (kind, value) -> hash, of all identifiers that were hashed
    lengths: list[Counts]  # by each of the job's measures
    resumed: bool = False  # an earlier run had converted it
    published: bool = False  # it lies in the job's `published`, not in its `out`


def convert_partition(job: ConvertJob, partition: Partition, report: Report) -> PartitionResult:
    """Convert one partition, or take it over from an earlier run.

    It is taken over if all its files are as they were written, and the images still have the size and the time that
    they had then. After a `StorageError` nothing says that the partition is done.
    """
    place = open_place(job.out)
    for url in (job.out, job.published) if job.options.resume else ():
        earlier = None if url is None else open_place(url)
        done = None if earlier is None else read_marker(earlier, partition.name, job.fingerprint)
        if earlier is None or done is None or done.stamp != _stamp(job, partition):
            continue
        try:
            verify_partition(earlier, done)
        except StorageError:
            continue  # damaged since: it is made again
        return replace(_take_over(job, partition, done, report), published=url == job.published)
    return _Conversion(job, partition, place, report).run()


def read_marker(place: Folder | Bucket, name: str, fingerprint: str) -> PartitionDone | None:
    """Read a partition's marker; None if there is none, or only one of another conversion or version."""
    try:
        done = PartitionDone(**json.loads(place.read(f"{name}/{DONE_NAME}")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return done if done.fingerprint == fingerprint else None


def verify_partition(place: Folder | Bucket, done: PartitionDone) -> None:
    """Read every file of a partition back; a `StorageError` says that one isn't there or differs."""
    for file in done.files:
        verify(place, f"{done.name}/{file['name']}", file["bytes"], file["xxh64"])


def _stamp(job: ConvertJob, partition: Partition) -> str:
    """Return what a marker would say of the images as they are now."""
    images, stamps = ImageSource(job.images, job.options), xxhash.xxh64()
    for record in records_of(job, partition):
        if not isinstance(record.value, RecordError) and not problems_of(record.value):
            for image in Conversation.from_record(record.value).images:
                stamps.update(images.stamp(image, record.embedded))
    return stamps.hexdigest()


class _Conversion:
    """One partition on its way."""

    def __init__(self, job: ConvertJob, partition: Partition, place: Folder | Bucket, report: Report) -> None:
        self._job, self._partition, self._report = job, partition, report
        self._threads = max(job.threads, _BUCKET_THREADS) if is_remote(job.images) else job.threads
        self._images, self._stamps = ImageSource(job.images, job.options, self._threads), xxhash.xxh64()
        self._hashed = KeyedHashes(job.key) if job.key is not None else None
        shape = COLUMNS, job.options.size_bytes, job.options.hashes
        self._writer = writer = ShardWriter(place, partition.name, *shape, partial(require_own, place, job.fingerprint))
        self._done = PartitionDone(
            fingerprint=job.fingerprint, partition=partition.index, files=writer.files, shards=writer.shards
        )
        self._problems: list[Problem] = []
        self._image_hashes: list[int] = []
        self._lengths = _Lengths(job)

    def run(self) -> PartitionResult:
        job, writer = self._job, self._writer
        try:
            load = partial(load_record, self._images)
            for loaded in in_threads(load, records_of(job, self._partition), self._threads):
                self._add(*loaded)
            written = job.writes_on(self._problems)
            if written:
                writer.finish()
                if self._image_hashes:
                    writer.write_file(IMAGE_HASHES_NAME, np.array(self._image_hashes, "<u8").tobytes())
                self._done.stamp = self._stamps.hexdigest()
                self._done.sources = dict(sorted(self._done.sources.items()))
                writer.write_marker(DONE_NAME, (json.dumps(vars(self._done), sort_keys=True) + "\n").encode())
        finally:
            writer.close()
        values = self._hashed.values if self._hashed is not None else {}
        done = self._done if written else None
        return PartitionResult(self._partition, done, self._problems, values, self._lengths.counts())

    def _add(
        self,
        record: RawRecord,
        conversation: Conversation | None,
        stored: list[StoredImage],
        problems: list[RecordError],
        stamps: bytes,
    ) -> None:
        done = self._done
        self._stamps.update(stamps)
        if isinstance(record.value, LeftOut):
            done.left_out[record.value.why] += 1
        for name, keys in keys_of(record, self._hashed is not None).items():
            count_keys(getattr(done, name), keys)
        place = self._partition.duplicates.get(record.position or 0)
        if place is not None and self._job.options.duplicate_ids == "refuse":
            problems.append(RecordError("duplicate-id", f"the id of {place}", _DUPLICATE_FIX, "id"))
        for error in problems:
            self._problems.append((record.without_value(), id_of(record.value), error))
            done.problems.append([record.position, record.line, error.rule, error.found, error.fix, error.where])
        if problems or conversation is None:
            self._report(1, 0)
            return
        sample = make_sample(record, conversation, stored, self._hashed, self._partition)
        if self._job.writes_on(self._problems):
            self._writer.write(sample)
            self._lengths.add(conversation)
        num_images, num_bytes = len(stored), sum(len(image.data) for image in stored)
        odd = (int(conversation.image_without_tag), conversation.dropped_turns)
        for counts in (done.counts, done.sources.setdefault(source_of(conversation), Counter())):
            counted = (1, num_images, int(not num_images), len(conversation.turns), *odd, num_bytes)
            for name, count in zip(COUNTS, counted, strict=True):
                counts[name] += count
        self._image_hashes += [image.hash for image in stored]
        for image in stored:
            for oddity in image.oddities:
                done.oddities[oddity] += 1
        self._report(1, num_bytes)


def load_record(images: ImageSource, record: RawRecord) -> Loaded:
    """Check a record by itself and read its images; runs in a thread."""
    if isinstance(record.value, RecordError):
        return record, None, [], [record.value], b""
    if isinstance(record.value, LeftOut):
        return record, None, [], [], b""
    problems = problems_of(record.value)
    if problems:
        return record, None, [], problems, b""
    conversation = Conversation.from_record(record.value)
    # Before they are read: what changes while it is read shall be noticed, too.
    stamps = b"".join(images.stamp(image, record.embedded) for image in conversation.images)
    stored: list[StoredImage] = []
    for index, image in enumerate(conversation.images):
        try:
            stored.append(images.load(image, record.embedded))
        except RecordError as error:
            problems.append(error.at(f"image {index + 1} of {conversation.num_images}"))
    return record, conversation, stored, problems, stamps


def keys_of(record: RawRecord, hashed: bool) -> dict[str, set[str]]:
    """A record's keys as they are counted (`KEY_COUNTS`); those that its layout ignored are read by nothing either."""
    if not isinstance(record.value, dict):
        return {}
    turns = record.value.get("conversations")
    keys = {key for turn in turns if isinstance(turn, dict) for key in turn} if isinstance(turns, list) else set()
    kept, away = keys_of_meta(record.value.get("meta"), hashed=hashed)
    unknown = {*(record.value.keys() - RECORD_KEYS), *record.ignored}
    return {
        "unknown_keys": {shown_key(key) for key in unknown},
        "unknown_turn_keys": {shown_key(key) for key in keys - TURN_KEYS},
        "kept_meta_keys": kept,
        "hashed_meta_keys": away,
    }


def source_of(conversation: Conversation) -> str:
    """The data set that a record says it comes from, as it may be shown; "" if it doesn't."""
    source = str(conversation.metadata.get("source", ""))
    return source if len(source) <= _MAX_SOURCE_LENGTH else "(a long name)"


class _Lengths:
    """Lengths of a partition's samples."""

    def __init__(self, job: ConvertJob) -> None:
        self._rows: list[tuple[Callable[[Conversation], tuple[int, int, int]], list[tuple[int, int, int]]]]
        self._rows = [(measure, []) for measure in job.measures]

    def add(self, conversation: Conversation) -> None:
        for measure, rows in self._rows:
            rows.append(measure(conversation))

    def counts(self) -> list[Counts]:
        return [np.array(rows, np.int32).reshape(-1, 3) for _, rows in self._rows]


_DUPLICATE_FIX = "give it its own id, or leave the key out"


def make_sample(
    record: RawRecord,
    conversation: Conversation,
    stored: list[StoredImage],
    hashed: KeyedHashes | None,
    partition: Partition,
) -> dict[str, Any]:
    """Build one sample of the shards; its images in parts, as `ShardWriter` takes them."""
    record_id = partition.id_of_sample(record.position or 0, conversation.id)
    metadata: dict[str, Any] = {**conversation.metadata}
    mpps = {image.mpp for image in stored if image.mpp is not None}
    if "mpp" not in metadata and len(mpps) == 1:
        metadata["mpp"] = mpps.pop()
    metadata["images"] = [str(image) for image in conversation.images]
    if hashed is not None:
        record_id = hashed.hash("id", record_id)
        metadata["images"] = [_hashed_image(image, hashed) for image in conversation.images]
        for kind in ("patient", "slide"):
            if kind in metadata:
                metadata[kind] = hashed.hash(kind, metadata[kind])
        if "meta" in metadata:
            metadata["meta"] = hashed.hash_meta(metadata["meta"])
    images = packed_parts([image.data for image in stored])
    return {"id": record_id, "conversation": conversation.to_shard(), "images": images, "metadata": metadata}


def _hashed_image(image: str | SlideRegion, hashed: KeyedHashes) -> str:
    """Hash a file's name; where on the slide a region lies identifies nobody."""
    if isinstance(image, SlideRegion):
        return hashed.hash("image", image.file) + str(image)[len(image.file) :]
    return hashed.hash("image", image)


def _take_over(job: ConvertJob, partition: Partition, done: PartitionDone, report: Report) -> PartitionResult:
    """Rebuild from the records what a marker doesn't hold: ids of bad ones and hashes, which identify, and lengths."""
    errors: dict[int, list[RecordError]] = {}
    for position, _line, *words in done.problems:
        errors.setdefault(position, []).append(RecordError(*words))
    problems: list[Problem] = []
    hashed, lengths = KeyedHashes(job.key) if job.key is not None else None, _Lengths(job)
    for record in records_of(job, partition):
        found = errors.get(record.position or 0, [])
        problems += [(record.without_value(), id_of(record.value), error) for error in found]
        if not found and not isinstance(record.value, LeftOut) and (hashed is not None or job.measures):
            conversation = Conversation.from_record(record.value)
            make_sample(record, conversation, [], hashed, partition)
            lengths.add(conversation)
        report(1, 0)
    values = {} if hashed is None else hashed.values
    return PartitionResult(partition, done, problems, values, lengths.counts(), resumed=True)


def records_of(job: ConvertJob, partition: Partition) -> Iterator[RawRecord]:
    """A partition's records, in order; a `StorageError` says that the file isn't what it was."""
    count, first = 0, (partition.first_position, partition.first_line)
    for record in InputFile(job.data, job.options.reading).range(partition.start, partition.end, *first):
        count += 1
        yield replace(record, value=read_image_tags(record.value)) if job.options.image_tags == "read" else record
    if count != partition.num_records:
        raise StorageError("--data: changed while it was converted; leave it alone and convert again with --overwrite")
