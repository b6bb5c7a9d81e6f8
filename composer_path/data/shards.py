"""From records and an image folder to MDS shards: all are checked, then written (by data_prep/convert.py).

Format version 1, one sample for each record, four columns: ``id`` (str), ``conversation`` (json, see
``Conversation.to_shard``), ``images`` (bytes, see ``pack_images``; free of metadata) and ``metadata`` (json:
those given of source, organ, stain, magnification, mpp, meta, patient, slide; file names under ``images``).
Id, patient, slide and file names are keyed hashes. ``meta`` is kept as given, but for the keys in
``identifiers.IDENTIFYING_KEYS``: nothing else in it may identify anybody, and that is the user's to see to.
"""

from __future__ import annotations

import os
import re
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from composer_path.data.conversation import (
    RECORD_KEYS,
    RULES,
    Conversation,
    RecordError,
    id_of,
    problems_of,
    resolve_image,
)
from composer_path.data.identifiers import KEY_NAME, MAPPING_SUFFIX, KeyedHashes
from composer_path.data.image_file import MAX_PIXELS, ImageError, check_image, sanitize_image
from composer_path.data.record_file import RawRecord, read_records
from composer_path.data.rejections import ConvertError, Rejections
from composer_path.data.shard_writer import ShardWriter, refuse_used_output

FORMAT_VERSION = 1
COLUMNS = {"id": "str", "conversation": "json", "images": "bytes", "metadata": "json"}
REJECTED_NAME = "rejected.jsonl"

# A key with any other look may be a sentence in the wrong place, so it is counted but not shown.
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w.-]{0,39}", re.ASCII)

# Decoding and sanitising images leave Python's lock; more threads than this wait for the disk.
_NUM_THREADS = min(8, os.cpu_count() or 1)

Item = TypeVar("Item")
Result = TypeVar("Result")


def pack_images(images: Sequence[bytes]) -> bytes:
    """Join image files into one value: count, sizes (little-endian uint32 each), then the files."""
    return struct.pack(f"<{len(images) + 1}I", len(images), *map(len, images)) + b"".join(images)


def unpack_images(data: bytes) -> list[bytes]:
    """Split what ``pack_images`` joined.

    Raises:
        ValueError: the sizes don't add up, so the value is damaged or of another format.
    """
    count = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
    start = 4 + 4 * count
    sizes = struct.unpack_from(f"<{count}I", data, 4) if start <= len(data) else ()
    if len(data) < 4 or start + sum(sizes) != len(data):
        raise ValueError(
            f"packed images must be a count, sizes and files, found {len(data)} bytes for {count} images; "
            "the shard is damaged or not of this format: convert the data again"
        )
    images = []
    for size in sizes:
        images.append(data[start : start + size])
        start += size
    return images


@dataclass
class ConvertSummary:
    """What a conversion wrote; ``str`` gives it as a table. Holds no text, name or id.

    Attributes:
        records: records written.
        images: images written; one that several records show counts each time.
        text_only: records without an image.
        turns: turns written, human and assistant.
        without_tag: records with one image and no tag; the image stands before the first question.
        dropped_turns: leading assistant turns that were dropped.
        rejected: records left out.
        rejected_by_rule: rule -> records that break it.
        unknown_keys: key of records that nothing reads -> records that have it.
        shards: shard files.
        bytes: size of the shard files.
        rejected_file: where the rejected records are listed, if any were.
        mapping_file: where hashes lead back to values, unless identifiers were kept.
    """

    records: int = 0
    images: int = 0
    text_only: int = 0
    turns: int = 0
    without_tag: int = 0
    dropped_turns: int = 0
    rejected: int = 0
    rejected_by_rule: dict[str, int] = field(default_factory=dict)
    unknown_keys: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    bytes: int = 0
    rejected_file: Path | None = None
    mapping_file: Path | None = None

    def count(self, conversation: Conversation) -> None:
        """Add one written record."""
        self.records += 1
        self.images += conversation.num_images
        self.text_only += conversation.num_images == 0
        self.turns += len(conversation.turns)
        self.without_tag += conversation.image_without_tag
        self.dropped_turns += conversation.dropped_turns

    def __str__(self) -> str:
        """One line for each figure; those about oddities only when there are any."""
        rows: list[tuple[str, object]] = [
            ("records", self.records),
            ("images", self.images),
            ("text-only records", self.text_only),
            ("turns", self.turns),
        ]
        odd = [
            ("records with one image and no tag", self.without_tag),
            ("leading assistant turns dropped", self.dropped_turns),
            ("records rejected", self.rejected),
        ]
        rows += [row for row in odd if row[1]]
        rows += [(f"  {rule}", count) for rule, count in self.rejected_by_rule.items()]
        rows += [(f"ignored key {key}", f"in {count} records") for key, count in self.unknown_keys.items()]
        rows += [("shards", self.shards), ("MB", f"{self.bytes / 1e6:.1f}")]
        rows += [("rejected records listed in", self.rejected_file)] if self.rejected_file else []
        rows += [("hashes lead back through", self.mapping_file)] if self.mapping_file else []
        return "\n".join(f"{name:<36}{value}" for name, value in rows)


def convert(
    data: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    on_error: str = "fail",
    ids: str = "hash",
    size_limit: int | str = "64mb",
    hashes: Sequence[str] = ("xxh64",),
    max_pixels: int = MAX_PIXELS,
    rejected: str | Path | None = None,
    key: str | Path | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> ConvertSummary:
    """Check all records and their images, then write them as MDS shards.

    Every image is read once to check it and once to write it. An interrupted conversion leaves no index.

    Args:
        data: JSON list or JSONL of records.
        images: folder that the records' file names are relative to.
        out: folder for the shards, empty or not there yet, or a URI (``s3://...``).
        on_error: "fail" writes nothing if any record breaks a rule; "skip" writes the good ones and lists the
            others.
        ids: "hash" stores keyed hashes of identifying values, "keep" stores them plainly.
        size_limit: size of a shard; 64 MB is read well from a disk and from an object store.
        hashes: checksums kept in the index; xxh64 is the cheapest.
        max_pixels: images with more pixels than this are refused unread (decompression bombs).
        rejected: where to list what is wrong with each record, with its id: by default ``rejected.jsonl``
            beside the input if ``on_error`` is "skip", and nowhere if it is "fail".
        key: secret key of the hashes, made if it isn't there: by default ``identifiers.key`` beside the input,
            so that all data sets of one folder share it. The mapping back is written beside the key.
        progress: called now and then with "checked" or "written" and the number of records.

    Raises:
        ConvertError: records break rules (all are listed together), nothing to read, nowhere to write.
    """
    data, images, out = Path(data), Path(images), os.fspath(out)
    _check_arguments(data, images, out, on_error, ids, size_limit, hashes)
    report = progress or (lambda done, count: None)

    rejections, unknown_keys, num_records = _check_records(data, images, max_pixels, report)
    rejected_file = Path(rejected) if rejected is not None else data.with_name(REJECTED_NAME)
    if rejections and (rejected is not None or on_error == "skip"):
        rejections.save(rejected_file)
    if rejections and on_error == "fail":
        raise ConvertError(f"nothing was written. {rejections}", rejections)
    if num_records == len(rejections):
        found = f"none is good. {rejections}" if num_records else "found none"
        raise ConvertError(f"{data.name}: there must be a record to write, {found}", rejections)

    summary = ConvertSummary(rejected=len(rejections), rejected_by_rule=rejections.by_rule(), unknown_keys=unknown_keys)
    summary.rejected_file = rejected_file if rejections else None
    hashed = None
    if ids == "hash":
        key_file = Path(key) if key is not None else data.with_name(KEY_NAME)
        hashed = KeyedHashes(key_file, key_file.with_name(data.stem + MAPPING_SUFFIX))
        summary.mapping_file = hashed.mapping_file

    def make_sample(record: RawRecord) -> tuple[Conversation, dict[str, Any]]:
        try:
            return _sample(record, images, max_pixels, hashed)
        except RecordError as error:
            message = f"{data.name} or its images changed after the check: {error.at(record.where)}"
            raise ConvertError(message) from None

    good = (record for record in read_records(data) if record.position not in rejections.positions)
    with ShardWriter(out, COLUMNS, size_limit, hashes) as writer:
        for conversation, sample in _in_threads(make_sample, good):
            writer.write(sample)
            summary.count(conversation)
            report("written", summary.records)
        if hashed is not None:
            hashed.save_mapping()
        options = {"ids": ids, "size_limit": size_limit, "hashes": list(hashes), "max_pixels": max_pixels}
        counts = {name: getattr(summary, name) for name in _COUNTS}
        version = {"format": "composer_path", "format_version": FORMAT_VERSION}
        writer.finish({**version, **counts, "options": options})
        summary.shards = len(writer.shards)
        summary.bytes = sum(shard["raw_data"]["bytes"] for shard in writer.shards)
    return summary


_COUNTS = ("records", "images", "text_only", "turns", "without_tag", "dropped_turns", "rejected")


def _check_arguments(
    data: Path, images: Path, out: str, on_error: str, ids: str, size_limit: int | str, hashes: Sequence[str]
) -> None:
    """Refuse before the first record what would else fail after the last."""
    if on_error not in ("fail", "skip"):
        raise ConvertError(f"--on-error: must be 'fail' or 'skip', found {on_error!r}")
    if ids not in ("hash", "keep"):
        raise ConvertError(f"--ids: must be 'hash' or 'keep', found {ids!r}")
    if not data.is_file():
        found = "a folder" if data.is_dir() else "no such file"
        raise ConvertError(f"--data {data}: must be a JSON or JSONL file, found {found}")
    if not images.is_dir():
        raise ConvertError(f"--images {images}: must be the folder of the images, found no such folder")

    from streaming.base.hashing import is_hash
    from streaming.base.util import bytes_to_int

    try:
        size = bytes_to_int(size_limit)
    except ValueError:
        size = 0
    if not 0 < size < 2**32:
        raise ConvertError(f"--size-limit: must be a size below 4 GB such as 64mb, found {size_limit!r}")
    unknown = [name for name in hashes if not is_hash(name)]
    if unknown:
        raise ConvertError(f"hashes: must be checksums such as xxh64 or sha256, found {unknown}")
    refuse_used_output(out)


def _check_records(
    data: Path, images: Path, max_pixels: int, report: Callable[[str, int], None]
) -> tuple[Rejections, dict[str, int], int]:
    """Try every rule on every record; returns what is wrong, the unknown keys, and the number of records."""
    rejections = Rejections(data)
    unknown_keys: Counter[str] = Counter()
    first_places: dict[str, str] = {}
    num_records = 0
    image_problems: dict[str, RecordError | None] = {}  # one tile may be in many records: decode it once

    def check(record: RawRecord) -> tuple[RawRecord, str | None, list[str], list[RecordError]]:
        """All that needs no knowledge of other records; runs in a thread."""
        if isinstance(record.value, RecordError):
            return record, None, [], [record.value]
        problems = problems_of(record.value)
        if not problems:
            names = Conversation.from_record(record.value).images
            for index, name in enumerate(names):
                if name not in image_problems:
                    image_problems[name] = _image_problem(name, images, max_pixels)
                problem = image_problems[name]
                if problem is not None:
                    problems.append(problem.at(f"image {index + 1} of {len(names)}"))
        keys = set(record.value) - RECORD_KEYS if isinstance(record.value, dict) else ()
        return record, id_of(record.value), sorted(keys), problems

    for record, record_id, keys, problems in _in_threads(check, read_records(data)):
        num_records += 1
        unknown_keys.update(key if _PLAIN_KEY.fullmatch(key) else "(not a plain name)" for key in keys)
        if record_id is not None and first_places.setdefault(record_id, record.where) != record.where:
            found = f"the id of {first_places[record_id]}"
            fix = "give it its own id, or leave the key out"
            problems.append(RecordError("duplicate-id", found, fix, "id"))
        for problem in problems:
            rejections.add(record, record_id, problem)
        report("checked", num_records)
    return rejections, dict(unknown_keys), num_records


def _image_problem(name: str, images: Path, max_pixels: int) -> RecordError | None:
    try:
        check_image(_read_image(name, images), max_pixels)
    except RecordError as error:
        return error
    except ImageError as error:
        return _as_record_error(error)
    return None


def _as_record_error(error: ImageError) -> RecordError:
    rule = error.rule if error.rule in RULES else "unreadable-image"
    return RecordError(rule, error.found, error.fix or "replace the file")


def _read_image(name: str, images: Path) -> bytes:
    path = resolve_image(name, images)
    try:
        return path.read_bytes()
    except OSError as error:
        found = error.strerror or "a read error"
        raise RecordError("unreadable-image", found, "check the file's rights") from None


def _sample(
    record: RawRecord, images: Path, max_pixels: int, hashed: KeyedHashes | None
) -> tuple[Conversation, dict[str, Any]]:
    """Build one sample of the shards.

    Raises:
        RecordError: the record or one of its images is not what was checked before.
    """
    if isinstance(record.value, RecordError):
        raise record.value
    conversation = Conversation.from_record(record.value)
    try:
        files = [sanitize_image(_read_image(name, images), max_pixels) for name in conversation.images]
    except ImageError as error:
        raise _as_record_error(error) from None
    # A record without an id is named by its place, so that errors at training time can still point to it.
    record_id = conversation.id if conversation.id is not None else f"record-{record.position}"
    metadata = {**conversation.metadata, "images": list(conversation.images)}
    if hashed is not None:
        record_id = hashed.hash("id", record_id)
        metadata["images"] = [hashed.hash("image", name) for name in conversation.images]
        for kind in ("patient", "slide"):
            if kind in metadata:
                metadata[kind] = hashed.hash(kind, metadata[kind])
        if "meta" in metadata:
            metadata["meta"] = hashed.hash_meta(metadata["meta"])
    sample = {"id": record_id, "conversation": conversation.to_shard(), "images": pack_images(files)}
    return conversation, {**sample, "metadata": metadata}


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map in several threads, in order, with a bounded number of items in memory."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * _NUM_THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
