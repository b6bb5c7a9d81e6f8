"""Converts one partition: the same function for one process, many processes, many machines and Spark.

Records are checked, their images read, and the good ones written to `part-00000/`. When all its files have been
verified, `done.json` is written there: counts, problems and the files with sizes and hashes; no text, no id.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from composer_path.conversion.identifiers import KeyedHashes
from composer_path.conversion.image_source import ImageSource, StoredImage
from composer_path.conversion.input_scan import Partition
from composer_path.conversion.options import ConvertOptions
from composer_path.conversion.record_file import RawRecord, read_range
from composer_path.parallel import Report, in_threads
from composer_path.records.conversation import Conversation, id_of
from composer_path.records.rules import RECORD_KEYS, RecordError, problems_of
from composer_path.records.slide_region import SlideRegion
from composer_path.shards.columns import COLUMNS, packed_parts
from composer_path.shards.index import DONE_NAME, IMAGE_HASHES_NAME, Part
from composer_path.shards.writer import ShardWriter, verify
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Bucket, Folder, is_remote, open_place

COUNTS = ("records", "images", "text_only", "turns", "without_tag", "dropped_turns", "image_bytes")

# A key with any other look may be a sentence in the wrong place, so it is counted but not shown.
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w.-]{0,39}", re.ASCII)
_MAX_SOURCE_LENGTH = 80
# Requests to a bucket wait for the network, so many go at once.
_BUCKET_THREADS = 16

# A record without its content, its id, and what is wrong with it.
Problem = tuple[RawRecord, str | None, RecordError]


@dataclass(frozen=True)
class ConvertJob:
    """What is the same for every partition of a conversion.

    Attributes:
        data: File of records.
        images: Folder of images.
        out: Where the data set goes.
        options: How it is to be done.
        fingerprint: Hash of the input and of every option that shapes the shards.
        key: Secret key of the hashes, None to keep identifiers plainly.
        threads: For images, in each process.
        check_only: Write nothing, only list problems.
    """

    data: str
    images: str
    out: str
    options: ConvertOptions
    fingerprint: str
    key: bytes | None = field(repr=False)
    threads: int = 1
    check_only: bool = False

    def writes_on(self, problems: list[Problem]) -> bool:
        """Whether there is still something to write of a partition in which these problems were found."""
        return not self.check_only and not (self.options.on_error == "fail" and problems)


@dataclass(kw_only=True)
class PartitionDone(Part):
    """A partition's marker: counts, problems and files; no text, no id.

    Attributes:
        fingerprint: Of the conversion.
        stamp: Hash of size and time of every image.
        counts: Of each of `COUNTS`.
        sources: The same counts for the records of each source.
        unknown_keys: Key that nothing reads -> number of records that have it.
        problems: Position, line, rule, found, fix and place of each.
    """

    fingerprint: str
    stamp: str
    counts: dict[str, int]
    sources: dict[str, dict[str, int]]
    unknown_keys: dict[str, int]
    problems: list[list[Any]]


@dataclass
class PartitionResult:
    """What became of a partition.

    Attributes:
        partition: The partition.
        done: Its marker; None if it wasn't written.
        problems: In order.
        values: (kind, value) -> hash, of all identifiers that were hashed.
        resumed: An earlier run had converted it.
    """

    partition: Partition
    done: PartitionDone | None
    problems: list[Problem]
    values: dict[tuple[str, str], str]
    resumed: bool = False


def convert_partition(job: ConvertJob, partition: Partition, report: Report) -> PartitionResult:
    """Convert one partition, or take it over from an earlier run.

    It is taken over if all its files are as they were written, and the images still have the size and the time that
    they had then.

    Raises:
        StorageError: A place can't be read or written. Nothing says then that the partition is done.
    """
    place = open_place(job.out)
    if job.options.resume:
        done = read_marker(place, partition.name, job.fingerprint)
        if done is not None and done.stamp == _stamp(job, partition) and _is_whole(place, done):
            return _take_over(job, partition, done, report)
    return _Conversion(job, partition, place, report).run()


def read_marker(place: Folder | Bucket, name: str, fingerprint: str) -> PartitionDone | None:
    """Read a partition's marker; None if there is none, or only one of another conversion or version."""
    try:
        done = PartitionDone(**json.loads(place.read(f"{name}/{DONE_NAME}")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return done if done.fingerprint == fingerprint else None


def verify_partition(place: Folder | Bucket, done: PartitionDone) -> None:
    """Read every file of a partition back.

    Raises:
        StorageError: One isn't there or differs.
    """
    for file in done.files:
        verify(place, f"{done.name}/{file['name']}", file["bytes"], file["xxh64"])


def _is_whole(place: Folder | Bucket, done: PartitionDone) -> bool:
    try:
        verify_partition(place, done)
    except StorageError:  # damaged since: it is made again
        return False
    return True


def _stamp(job: ConvertJob, partition: Partition) -> str:
    """Return what a marker would say of the images as they are now."""
    images, stamps = ImageSource(job.images, job.options), xxhash.xxh64()
    for record in _records(job, partition):
        if not isinstance(record.value, RecordError) and not problems_of(record.value):
            for image in Conversation.from_record(record.value).images:
                stamps.update(images.stamp(image))
    return stamps.hexdigest()


class _Conversion:
    """One partition on its way."""

    def __init__(self, job: ConvertJob, partition: Partition, place: Folder | Bucket, report: Report) -> None:
        self._job, self._partition, self._report = job, partition, report
        self._images, self._stamps = ImageSource(job.images, job.options), xxhash.xxh64()
        self._hashed = KeyedHashes(job.key) if job.key is not None else None
        self._writer = ShardWriter(place, partition.name, COLUMNS, job.options.size_bytes, job.options.hashes)
        self._counts = Counter(dict.fromkeys(COUNTS, 0))
        self._sources: dict[str, Counter[str]] = {}
        self._unknown_keys: Counter[str] = Counter()
        self._problems: list[Problem] = []
        self._image_hashes: list[int] = []

    def run(self) -> PartitionResult:
        job, partition, writer = self._job, self._partition, self._writer
        try:
            threads = max(job.threads, _BUCKET_THREADS) if is_remote(job.images) else job.threads
            for record, loaded, problems, stamps in in_threads(self._load, _records(job, partition), threads):
                self._stamps.update(stamps)
                self._add(record, loaded, problems)
            done = None
            if job.writes_on(self._problems):
                writer.finish()
                if self._image_hashes:
                    writer.write_file(IMAGE_HASHES_NAME, np.array(self._image_hashes, "<u8").tobytes())
                done = self._marker()
                writer.write_marker(DONE_NAME, (json.dumps(vars(done), sort_keys=True) + "\n").encode())
        finally:
            writer.close()
        values = self._hashed.values if self._hashed is not None else {}
        return PartitionResult(partition, done, self._problems, values)

    def _load(
        self, record: RawRecord
    ) -> tuple[RawRecord, tuple[Conversation, list[StoredImage]] | None, list[RecordError], bytes]:
        """Check a record by itself and read its images; runs in a thread."""
        if isinstance(record.value, RecordError):
            return record, None, [record.value], b""
        problems = problems_of(record.value)
        if problems:
            return record, None, problems, b""
        conversation = Conversation.from_record(record.value)
        # Before they are read: what changes while it is read shall be noticed, too.
        stamps = b"".join(self._images.stamp(image) for image in conversation.images)
        stored: list[StoredImage] = []
        for index, image in enumerate(conversation.images):
            try:
                stored.append(self._images.load(image))
            except RecordError as error:
                problems.append(error.at(f"image {index + 1} of {conversation.num_images}"))
        return record, (conversation, stored), problems, stamps

    def _add(
        self,
        record: RawRecord,
        loaded: tuple[Conversation, list[StoredImage]] | None,
        problems: list[RecordError],
    ) -> None:
        self._unknown_keys.update(unknown_keys_of(record.value))
        place = self._partition.duplicates.get(record.position or 0)
        if place is not None:
            problems.append(RecordError("duplicate-id", f"the id of {place}", _DUPLICATE_FIX, "id"))
        self._problems += [(_without_value(record), id_of(record.value), problem) for problem in problems]
        if problems or loaded is None:
            self._report(1, 0)
            return
        conversation, stored = loaded
        sample = make_sample(record, conversation, stored, self._hashed)
        num_bytes = sum(len(image.data) for image in stored)
        if self._job.writes_on(self._problems):
            self._writer.write(sample)
        self._count(conversation, num_bytes)
        self._image_hashes += [image.hash for image in stored]
        self._report(1, num_bytes)

    def _count(self, conversation: Conversation, num_bytes: int) -> None:
        num_images, num_turns = conversation.num_images, len(conversation.turns)
        odd = (int(conversation.image_without_tag), conversation.dropped_turns)
        added = dict(zip(COUNTS, (1, num_images, int(not num_images), num_turns, *odd, num_bytes), strict=True))
        self._counts.update(added)
        source = conversation.metadata.get("source", "")
        source = source if len(source) <= _MAX_SOURCE_LENGTH else "(a long name)"
        self._sources.setdefault(source, Counter()).update(added)

    def _marker(self) -> PartitionDone:
        return PartitionDone(
            fingerprint=self._job.fingerprint,
            partition=self._partition.index,
            stamp=self._stamps.hexdigest(),
            counts=dict(self._counts),
            sources={name: dict(counts) for name, counts in sorted(self._sources.items())},
            unknown_keys=dict(self._unknown_keys),
            problems=[
                [record.position, record.line, error.rule, error.found, error.fix, error.where]
                for record, _, error in self._problems
            ],
            files=self._writer.files,
            shards=self._writer.shards,
        )


_DUPLICATE_FIX = "give it its own id, or leave the key out"


def make_sample(
    record: RawRecord, conversation: Conversation, stored: list[StoredImage], hashed: KeyedHashes | None
) -> dict[str, Any]:
    """Build one sample of the shards; its images in parts, as `ShardWriter` takes them."""
    # A record without an id is named by its place, so that errors at training time can still point to it.
    record_id = conversation.id if conversation.id is not None else f"record-{record.position}"
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


def unknown_keys_of(value: object) -> list[str]:
    """List a record's keys that nothing reads, as they may be shown."""
    keys = set(value) - RECORD_KEYS if isinstance(value, dict) else set()
    return sorted(key if _PLAIN_KEY.fullmatch(key) else "(not a plain name)" for key in keys)


def _take_over(job: ConvertJob, partition: Partition, done: PartitionDone, report: Report) -> PartitionResult:
    """Rebuild from the records what a marker doesn't hold because it identifies: ids of bad ones, and hashes."""
    errors: dict[int, list[RecordError]] = {}
    for position, _line, rule, found, fix, where in done.problems:
        errors.setdefault(position, []).append(RecordError(rule, found, fix, where))
    problems: list[Problem] = []
    hashed = KeyedHashes(job.key) if job.key is not None else None
    for record in _records(job, partition):
        found_errors = errors.get(record.position or 0, [])
        problems += [(_without_value(record), id_of(record.value), error) for error in found_errors]
        if not found_errors and hashed is not None:
            make_sample(record, Conversation.from_record(record.value), [], hashed)
        report(1, 0)
    values = hashed.values if hashed is not None else {}
    return PartitionResult(partition, done, problems, values, resumed=True)


def _without_value(record: RawRecord) -> RawRecord:
    return RawRecord(record.position, record.line, None)


def _records(job: ConvertJob, partition: Partition) -> Iterator[RawRecord]:
    count = 0
    try:
        for record in read_range(
            job.data, partition.start, partition.end, partition.first_position, partition.first_line
        ):
            count += 1
            yield record
    except RecordError:  # a list is decoded at once
        count = -1
    if count != partition.num_records:
        raise StorageError("--data: changed while it was converted; leave it alone and convert again with --overwrite")
