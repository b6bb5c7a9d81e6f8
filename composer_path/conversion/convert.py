"""From records and an image folder to MDS shards, checked, all or nothing (by data_prep/convert.py).

1. The input is read once to find duplicate ids and to cut it into partitions (``input_scan``).
2. Each partition is converted by itself, here, in other processes or on other machines (``partition``).
3. When all are there and verified, the index is published (``destination``).

Format version 1, one sample for each record, four columns: ``id`` (str), ``conversation`` (json, see
``Conversation.to_shard``), ``images`` (bytes, see ``pack_images``; free of metadata) and ``metadata`` (json:
those given of source, organ, stain, magnification, mpp, meta, patient, slide; file names under ``images``).
Id, patient, slide and file names are keyed hashes. ``meta`` is kept as given, but for the keys in
``identifiers.IDENTIFYING_KEYS``: nothing else in it may identify anybody, and that is the user's to see to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from composer_path.conversion.destination import (
    INDEX_NAME,
    MANIFEST_NAME,
    count_repeated_images,
    new_manifest,
    ours,
    prepare,
    publish,
    read_json,
)
from composer_path.conversion.identifiers import KEY_NAME, MAPPING_SUFFIX, MappingFile, read_or_make_key
from composer_path.conversion.input_scan import InputScan
from composer_path.conversion.local_engine import Task, run_locally
from composer_path.conversion.options import check_places, parse_part, parse_size, refuse_wrong_options
from composer_path.conversion.partition import ConvertJob, PartitionResult, read_marker, verify_partition
from composer_path.conversion.record_file import RawRecord
from composer_path.conversion.rejections import ConvertError, Rejections
from composer_path.conversion.summary import ConvertSummary, card_after, card_before, rejected_by_rule
from composer_path.images.file import MAX_PIXELS
from composer_path.shards.columns import COLUMNS, FORMAT_VERSION, pack_images, unpack_images
from composer_path.storage.places import Bucket, Folder, is_remote, open_place

__all__ = [
    "COLUMNS",
    "FORMAT_VERSION",
    "MAX_PIXELS",
    "ConvertSummary",
    "convert",
    "merge",
    "pack_images",
    "unpack_images",
]

REJECTED_NAME = "rejected.jsonl"

# Called with what is being done, records so far, records in all (None: not known yet) and bytes of images so far.
Progress = Callable[[str, int, int | None, int], None]


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
    check: str = "full",
    resized: dict[str, Any] | None = None,
    rejected: str | Path | None = None,
    key: str | Path | None = None,
    workers: int = 1,
    partition_size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    part: str | None = None,
    engine: str = "local",
    master: str | None = None,
    progress: Progress | None = None,
) -> ConvertSummary:
    """Check all records and their images, and write them as MDS shards.

    Every image is read once. Until everything is there and verified there is no index, so nothing can train on a
    part. The shards depend on the input and the options, not on workers, parts, engine or interruptions.

    Args:
        data: JSON list or JSONL of records; a file, or an address in a bucket (``s3://...``).
        images: folder that the records' file names are relative to, or an address.
        out: folder for the shards, empty or not there yet, or an address.
        on_error: "fail" writes nothing if any record breaks a rule; "skip" writes the good ones and lists the
            others.
        ids: "hash" stores keyed hashes of identifying values, "keep" stores them plainly.
        size_limit: size of a shard; 64 MB is read well from a disk and from an object store.
        hashes: checksums kept in the index; xxh64 is the cheapest.
        max_pixels: images with more pixels than this are refused unread (decompression bombs).
        check: "full" decodes every image once; "header" reads its structure only, and misses damaged pixels.
        resized: ``{image_size, fit, pad_color}`` stores finished squares in place of the files.
        rejected: where to list what is wrong with each record, with its id: by default ``rejected.jsonl``
            beside the input if ``on_error`` is "skip", and nowhere if it is "fail".
        key: secret key of the hashes, made if it isn't there: by default ``identifiers.key`` beside the input,
            so that all data sets of one folder share it. The mapping back is written beside the key.
        workers: processes.
        partition_size: records that are converted together; by default 256 to 8192, by number and kind.
        resume: go on where the same command was interrupted.
        overwrite: delete what an earlier conversion has written to ``out``.
        part: "2/8" converts the second eighth; ``merge`` publishes when all are there.
        engine: "local", or "spark" to have Spark's executors convert the partitions.
        master: Spark's address, for example "spark://host:7077" or "local[4]".
        progress: called now and then.

    Raises:
        ConvertError: records break rules (all are listed together), nothing to read, nowhere to write.
        StorageError: a place failed; the same call with ``resume`` goes on.
    """
    data, images, out = os.fspath(data), os.fspath(images), os.fspath(out)
    report = progress or (lambda stage, records, total, num_bytes: None)
    index, parts = parse_part(part)
    size_bytes = parse_size(size_limit)
    refuse_wrong_options(
        on_error=on_error, ids=ids, hashes=hashes, check=check, resized=resized, workers=workers, engine=engine,
        partition_size=partition_size, resume=resume, overwrite=overwrite, parts=parts,
    )  # fmt: skip
    place = check_places(data, images, out, used_is_fine=resume or overwrite or parts > 1)
    name = PurePosixPath(data).name
    if rejected is None and on_error == "skip":
        rejected = REJECTED_NAME if is_remote(data) else Path(data).with_name(REJECTED_NAME)
    rejections = Rejections(name, Path(rejected) if rejected is not None else None)

    scan = InputScan(data, partition_size, lambda count: report("reading", count, None, 0))
    if scan.problem is not None:
        rejections.add(RawRecord(None, None, None), None, scan.problem)
        rejections.save()
        raise ConvertError(f"nothing was written. {rejections}", rejections)
    if not scan.num_records:
        raise ConvertError(f"{name}: there must be a record to write, found none", rejections)
    key_file, mapping = _key_files(data, key, index, parts) if ids == "hash" else (None, None)
    key_bytes = read_or_make_key(key_file) if key_file is not None else None

    options: dict[str, Any] = {"ids": ids, "size_limit": size_limit, "hashes": sorted(hashes)}
    options |= {"max_pixels": max_pixels, "check": check, "resized": resized}
    options |= {"on_error": on_error, "partition_size": scan.partition_size}
    source = {"sha256": scan.sha256, "bytes": scan.num_bytes, "records": scan.num_records}
    fingerprint = _fingerprint(options, source, key_bytes)
    manifest = new_manifest(fingerprint, parts, scan.num_partitions, card_before(options, source, fingerprint))
    mine = [partition for partition in scan.partitions() if partition.index % parts == index - 1]
    names = {partition.name for partition in mine}
    prepare(place, manifest, resume=resume, overwrite=overwrite, own=names)
    if resume:  # a partition may be made anew: no index until all is verified again
        place.delete([name for name in place.files() if name == INDEX_NAME])
    workers = max(1, min(workers, len(mine)))
    job = ConvertJob(
        data=data, images=images, out=out, fingerprint=fingerprint, size_limit=size_bytes, hashes=tuple(hashes),
        max_pixels=max_pixels, check=check, resized=resized, key=key_bytes, resume=resume,
        threads=max(1, min(8, os.cpu_count() or 1) // workers), stop_at_problem=on_error == "fail",
    )  # fmt: skip

    def tasks() -> Iterator[Task]:
        for partition in mine:
            # Once it is clear that nothing will be written, the rest is only looked through.
            yield replace(job, check_only=on_error == "fail" and len(rejections) > 0), partition

    summary = ConvertSummary(part=part if parts > 1 else None)
    total = sum(partition.num_records for partition in mine)
    dones: list[dict[str, Any]] = []
    done_records = done_bytes = 0

    def count(records: int, num_bytes: int) -> None:
        nonlocal done_records, done_bytes
        done_records, done_bytes = done_records + records, done_bytes + num_bytes
        report("converting", done_records, total, done_bytes)

    count(0, 0)
    try:
        for result in _run(engine, master, tasks(), workers, count):
            _collect(result, rejections, mapping, summary, dones)
    except BaseException:
        rejections.discard()
        raise
    rejections.save()
    summary.rejected, summary.rejected_by_rule = len(rejections), rejections.by_rule()
    summary.rejected_file = rejections.file if rejections else None
    if rejections and (on_error == "fail" or (parts == 1 and not summary.records)):
        _take_back(place, names, parts)
        if on_error == "fail":
            raise ConvertError(f"nothing was written. {rejections}", rejections)
        raise ConvertError(f"{name}: there must be a record to write, none is good. {rejections}", rejections)
    if mapping is not None:
        mapping.save()
        summary.mapping_file = mapping.path
    if parts == 1:
        summary.repeated_images = count_repeated_images(place, dones)
        publish(place, dones, card_after(manifest["card"], summary, scan.num_partitions))
    return summary


def merge(out: str | Path, *, workers: int = 1, progress: Progress | None = None) -> ConvertSummary:
    """Publish a data set that was converted in parts: all must be there, and every file is read back.

    Args:
        out: where the parts were written.
        workers: files that are read at once.
        progress: called now and then.

    Raises:
        ConvertError: a part is missing, or there are no parts.
        StorageError: a file isn't what its part has written.
    """
    place = open_place(os.fspath(out))
    files = place.files()
    if INDEX_NAME in files:
        raise ConvertError(f"{place}: must hold parts to merge, found a complete data set")
    manifest = read_json(place, MANIFEST_NAME)
    if "num_partitions" not in manifest:
        raise ConvertError(f"{place}: must hold parts to merge, found none; write them with convert.py --part i/N")
    dones: list[dict[str, Any]] = []
    missing: dict[int, int] = {}
    parts, total = manifest["parts"], manifest["num_partitions"]
    for index in range(total):
        done = read_marker(place, f"part-{index:05}", manifest["fingerprint"])
        if done is None:
            missing[index % parts + 1] = missing.get(index % parts + 1, 0) + 1
        else:
            dones.append(done)
    if missing:
        found = ", ".join(f"{part}/{parts} ({count} partitions)" for part, count in sorted(missing.items()))
        fix = "run them, with --resume where they were begun"
        raise ConvertError(f"{place}: all {parts} parts must be there, missing or of another input: {found}; {fix}")
    summary = ConvertSummary()
    summary.rejected, summary.rejected_by_rule = rejected_by_rule(dones)
    with ThreadPoolExecutor(workers) as pool:  # hashing and reading leave Python's lock
        checks = [pool.submit(verify_partition, place, f"part-{done['partition']:05}", done) for done in dones]
        for index, (check, done) in enumerate(zip(checks, dones, strict=True)):
            check.result()
            summary.add(done)
            if progress is not None:
                progress("verifying", index + 1, total, summary.bytes)
    if not summary.records:
        raise ConvertError(f"{place}: there must be a record to write, none is good")
    summary.repeated_images = count_repeated_images(place, dones)
    publish(place, dones, card_after(manifest["card"], summary, total))
    return summary


def _run(
    engine: str, master: str | None, tasks: Iterator[Task], workers: int, report: Callable[[int, int], None]
) -> Iterator[PartitionResult]:
    if engine == "spark":
        from composer_path.conversion.spark_engine import run_with_spark

        return run_with_spark(tasks, master, report)
    return run_locally(tasks, workers, report)


def _collect(
    result: PartitionResult,
    rejections: Rejections,
    mapping: MappingFile | None,
    summary: ConvertSummary,
    dones: list[dict[str, Any]],
) -> None:
    for record, record_id, error in result.problems:
        rejections.add(record, record_id, error)
    if mapping is not None:
        mapping.add(result.values)
    summary.resumed += result.resumed
    if result.done is not None:
        summary.add(result.done)
        dones.append({**result.done, "problems": []})  # there may be millions


def _take_back(place: Folder | Bucket, names: set[str], parts: int) -> None:
    """Delete what this conversion has written; other parts' partitions stay."""
    files = [name for name in ours(place.files()) if name.partition("/")[0] in names]
    place.delete([*files, *([MANIFEST_NAME] if parts == 1 else [])])


def _key_files(data: str, key: str | Path | None, index: int, parts: int) -> tuple[Path, MappingFile]:
    if key is None and is_remote(data):
        raise ConvertError("--key: must be given when --data lies in a bucket; the key must not lie there, found none")
    key_file = Path(key) if key is not None else Path(data).with_name(KEY_NAME)
    # Parts may run at the same time, so each writes its own.
    suffix = MAPPING_SUFFIX if parts == 1 else f".part-{index}-of-{parts}{MAPPING_SUFFIX}"
    return key_file, MappingFile(key_file.with_name(PurePosixPath(data).stem + suffix))


def _fingerprint(options: dict[str, Any], source: dict[str, Any], key: bytes | None) -> str:
    """Hash what shapes the shards; two keys differ in it, but it doesn't help to guess one."""
    key_hash = None if key is None else hashlib.sha256(b"composer_path fingerprint\0" + key).hexdigest()
    shaping = {"format_version": FORMAT_VERSION, "options": options, "source": source, "key": key_hash}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:32]
