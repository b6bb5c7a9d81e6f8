"""From records and an image folder to MDS shards, checked, all or nothing.

1. The input is read once to find duplicate ids and to cut it into partitions (`input_scan`).
2. Each partition is converted by itself, here, in other processes or on other machines (`engines`, `partition`).
3. When all are there and verified, the index is published (`composer_path.shards.index`).

Format version 1, one sample for each record, four columns: `id` (str), `conversation` (json, see
`Conversation.to_shard`), `images` (bytes, see `pack_images`; free of metadata) and `metadata` (json: those given of
source, organ, stain, magnification, mpp, meta, patient, slide; file names under `images`). Id, patient, slide and file
names are keyed hashes. `meta` is kept as given, but for the keys that `identifying_keys` knows: nothing else in it may
identify anybody, and that is the user's to see to; the data card lists by key what was kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from composer_path.conversion.destination import Manifest, check_places, prepare, read_manifest, require_unused
from composer_path.conversion.engines import Task, run_locally, run_with_spark
from composer_path.conversion.identifiers import KEY_NAME, MAPPING_SUFFIX, MappingFile, read_or_make_key
from composer_path.conversion.input_scan import InputScan
from composer_path.conversion.options import ConvertOptions
from composer_path.conversion.partition import ConvertJob, Counts, PartitionDone, read_marker, verify_partition
from composer_path.conversion.record_file import RawRecord
from composer_path.conversion.rejected_file import ConvertError, Rejections
from composer_path.conversion.replacement import take_place
from composer_path.conversion.sample_lengths import CountedLengths, WantedLengths, counted, read_parts
from composer_path.conversion.summary import ConvertSummary, card_before, count_repeated_images, rejected_by_rule
from composer_path.images.levels import index_keys
from composer_path.parallel import in_threads
from composer_path.shards.columns import FORMAT_VERSION
from composer_path.shards.index import INDEX_NAME, MANIFEST_NAME, held, is_ours, part_name, publish, require_own
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Bucket, Folder, is_remote, open_place

REJECTED_NAME = "rejected.jsonl"

# Called with what is being done, records so far, records in all (None: not known yet) and bytes of images so far.
Progress = Callable[[str, int, int | None, int], None]


def convert(
    data: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    lengths: Sequence[WantedLengths] = (),
    **options: Any,
) -> ConvertSummary:
    """Check all records and their images, and write them as MDS shards.

    Every image is read once. Until everything is there and verified there is no index, so nothing can train on a
    part. The shards depend on the input and the options, not on workers, parts, engine or interruptions.

    Args:
        data: JSON list or JSONL of records; a file, or an address in a bucket (`s3://...`).
        images: Folder that the records' file names are relative to, or an address.
        out: Folder for the shards, empty or not there yet, or an address.
        progress: Called now and then.
        lengths: To be counted on the way and written beside the shards, which don't depend on them.
        options: Those of `ConvertOptions`, by name.

    Raises:
        ConvertError: Records break rules (all are listed together), nothing to read, nowhere to write.
        StorageError: A place failed; the same call with `resume` goes on.
        ProcessKilled: A process was killed; the same call with `resume` goes on.
    """
    chosen = ConvertOptions(**options)
    data, images, out = os.fspath(data), os.fspath(images), os.fspath(out)
    report = progress or (lambda stage, records, total, num_bytes: None)
    place = check_places(data, images, out)
    with held(place, chosen.part_number if chosen.num_parts > 1 else None):
        return _convert(data, images, out, place, chosen, report, lengths)


def _convert(
    data: str,
    images: str,
    out: str,
    place: Folder | Bucket,
    chosen: ConvertOptions,
    report: Progress,
    lengths: Sequence[WantedLengths],
) -> ConvertSummary:
    """Convert into a place that is held."""
    parts = chosen.num_parts
    if not (chosen.resume or chosen.overwrite or parts > 1):
        require_unused(place)
    name = PurePosixPath(data).name
    key_file, mapping = _key_files(data, chosen) if chosen.ids == "hash" else (None, None)
    rejections = Rejections(name, _rejected_file(data, chosen))
    protected: list[str | Path] = [data]
    if key_file is not None and mapping is not None:
        protected += [key_file, mapping.path]
    rejections.check_file(protected, out if isinstance(place, Folder) else None)
    if chosen.key is not None and isinstance(place, Folder) and _lies_in(chosen.key, out):
        raise ConvertError(f"--key {chosen.key}: must not lie in --out, where the hashes go; choose another place")
    scan = InputScan(data, chosen.partition_size, lambda count: report("reading", count, None, 0), chosen.reading)
    if scan.problem is not None:
        rejections.add(RawRecord(None, None, None), None, scan.problem)
        rejections.save()
        raise ConvertError(f"nothing was written. {rejections}", rejections)
    if not scan.num_records:
        raise ConvertError(f"{name}: there must be a record to write, found none", rejections)
    key = read_or_make_key(key_file) if key_file is not None else None

    shaping = chosen.shaping(scan.partition_size)
    source = {"sha256": scan.sha256, "bytes": scan.num_bytes, "records": scan.num_records}
    fingerprint = _fingerprint(shaping, source, key)
    card = card_before(shaping, source, fingerprint)
    mine = [partition for partition in scan.partitions() if partition.index % parts == chosen.part_number - 1]
    names = {partition.name for partition in mine}
    manifest = Manifest(fingerprint=fingerprint, parts=parts, num_partitions=scan.num_partitions, card=card)
    target = prepare(place, manifest, resume=chosen.resume, overwrite=chosen.overwrite, own=names)
    workers = max(1, min(chosen.workers, len(mine)))
    threads = max(1, min(8, os.cpu_count() or 1) // workers)
    measures = tuple(one.measure for one in lengths)
    beside = target is not place
    to = _url(target)
    published = out if beside and chosen.resume else None
    job = ConvertJob(data, images, to, chosen, fingerprint, key, threads, measures, published=published)

    def tasks() -> Iterator[Task]:
        for partition in mine:
            # Once it is clear that nothing will be written, the rest is only looked through.
            yield replace(job, check_only=chosen.on_error == "fail" and len(rejections) > 0), partition

    num_records, num_bytes, total = 0, 0, sum(partition.num_records for partition in mine)

    def count(more_records: int, more_bytes: int) -> None:
        nonlocal num_records, num_bytes
        num_records, num_bytes = num_records + more_records, num_bytes + more_bytes
        report("converting", num_records, total, num_bytes)

    count(0, 0)
    spark = chosen.engine == "spark"
    results = run_with_spark(tasks(), chosen.master, count) if spark else run_locally(tasks(), workers, count)
    summary = ConvertSummary(part=chosen.part if parts > 1 else None)
    dones: list[PartitionDone] = []
    written: list[PartitionDone] = []
    counts: list[list[Counts]] = []
    for result in results:
        for problem in result.problems:
            rejections.add(*problem)
        if mapping is not None:
            mapping.add(result.values)
        summary.resumed += result.resumed
        if result.done is not None:
            summary.add(result.done)
            dones.append(replace(result.done, problems=[]))  # there may be millions
            counts.append(result.lengths)
            if not result.published:
                written.append(dones[-1])
    rejections.save()
    summary.rejected, summary.rejected_by_rule = len(rejections), rejections.by_rule()
    summary.rejected_file = rejections.file if rejections else None
    failed = bool(rejections) and chosen.on_error == "fail"
    if failed or (parts == 1 and not summary.records):
        _take_back(target, names, fingerprint, parts)
        if failed:
            raise ConvertError(f"nothing was written. {rejections}", rejections)
        why = f"none is good. {rejections}" if rejections else "none is wanted; change --where"
        raise ConvertError(f"{name}: there must be a record to write, {why}", rejections)
    if mapping is not None:
        mapping.save()
        summary.mapping_file = mapping.path
    found = counted(lengths, dones, counts)
    if parts == 1:
        _require_whole(target, written, fingerprint)
        if beside:
            take_place(place, written, whole=chosen.overwrite)
        _publish(place, dones, manifest, summary, found)
    else:
        for one in found:
            one.write_part(place, chosen.part_number)
    return summary


def merge(out: str | Path, *, workers: int = 1, progress: Progress | None = None) -> ConvertSummary:
    """Publish a data set that was converted in parts: all must be there, and every file is read back.

    `workers` files are read at once. A `ConvertError` says that parts are missing, a `StorageError` that a file isn't
    what its part has written.
    """
    place = open_place(os.fspath(out))
    with held(place):
        return _merge(place, workers, progress)


def _merge(place: Folder | Bucket, workers: int, progress: Progress | None) -> ConvertSummary:
    if INDEX_NAME in place.files():
        raise ConvertError(f"{place}: must hold parts to merge, found a complete data set")
    manifest = read_manifest(place)
    if manifest is None:
        raise ConvertError(f"{place}: must hold parts to merge, found none; `convert --part i/N` writes them")
    dones: list[PartitionDone] = []
    missing: Counter[int] = Counter()  # partitions of each part
    parts, total = manifest.parts, manifest.num_partitions
    for index in range(total):
        done = read_marker(place, part_name(index), manifest.fingerprint)
        if done is None:
            missing[index % parts + 1] += 1
        else:
            dones.append(done)
    if missing:
        found = ", ".join(f"{part}/{parts} ({count} partitions)" for part, count in sorted(missing.items()))
        fix = "run them, with --resume where they were begun"
        raise ConvertError(f"{place}: all {parts} parts must be there, missing or of another input: {found}; {fix}")
    summary = ConvertSummary()
    summary.rejected, summary.rejected_by_rule = rejected_by_rule(dones)
    checks = in_threads(partial(verify_partition, place), dones, workers)  # hashing and reading leave Python's lock
    for index, (done, _) in enumerate(zip(dones, checks, strict=True), start=1):
        summary.add(done)
        if progress is not None:
            progress("verifying", index, total, summary.bytes)
    if not summary.records:
        raise ConvertError(f"{place}: there must be a record to write, none is good")
    _publish(place, dones, manifest, summary, read_parts(place))
    return summary


def _publish(
    place: Folder | Bucket,
    dones: list[PartitionDone],
    manifest: Manifest,
    summary: ConvertSummary,
    lengths: Sequence[CountedLengths],
) -> None:
    def write_lengths(index: bytes) -> None:
        whole = [one for one in lengths if one.is_of(dones)]
        summary.lengths = [one.write(place, index) for one in whole]
        summary.lengths_left_out = len(lengths) - len(whole)

    summary.repeated_images = count_repeated_images(place, dones)
    card = {**manifest.card, **summary.counts(), "partitions": manifest.num_partitions}
    said = index_keys(bool(card["options"].get("scale_levels")), summary.oddities)
    publish(place, dones, card, said, beside=write_lengths)


def _require_whole(place: Folder | Bucket, written: list[PartitionDone], fingerprint: str) -> None:
    """Raise `StorageError` unless all that was written is still this conversion's: a bucket can't be locked."""
    require_own(place, fingerprint)
    read = partial(read_marker, place, fingerprint=fingerprint)
    for done, found in zip(written, in_threads(read, [done.name for done in written], 16), strict=True):
        if found is None or (found.files, found.shards) != (done.files, done.shards):
            raise StorageError(
                f"{place}: {done.name} must be as this conversion wrote it, found another one's; "
                "nothing was published; let one at a time write there, and convert again"
            )


def _lies_in(path: str | Path, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _url(place: Folder | Bucket) -> str:
    return os.fspath(place.path) if isinstance(place, Folder) else place.url


def _take_back(place: Folder | Bucket, names: set[str], fingerprint: str, parts: int) -> None:
    """Delete what this conversion has written; other parts' partitions stay, and what another one has begun since."""
    with suppress(StorageError):
        require_own(place, fingerprint)
        _delete(place, names, parts)


def _delete(place: Folder | Bucket, names: set[str], parts: int) -> None:
    files = [name for name in place.files() if is_ours(name) and name.partition("/")[0] in names]
    place.delete([*files, *([MANIFEST_NAME] if parts == 1 else [])])


def _rejected_file(data: str, options: ConvertOptions) -> Path | None:
    if options.rejected is not None:
        return Path(options.rejected)
    if options.on_error == "fail":
        return None
    return Path(REJECTED_NAME) if is_remote(data) else Path(data).with_name(REJECTED_NAME)


def _key_files(data: str, options: ConvertOptions) -> tuple[Path, MappingFile]:
    if options.key is None and is_remote(data):
        raise ConvertError("--key: must be given when --data lies in a bucket; the key must not lie there, found none")
    key_file = Path(options.key) if options.key is not None else Path(data).with_name(KEY_NAME)
    # Parts may run at the same time, so each writes its own.
    part = "" if options.num_parts == 1 else f".part-{options.part_number}-of-{options.num_parts}"
    return key_file, MappingFile(key_file.with_name(PurePosixPath(data).stem + part + MAPPING_SUFFIX))


def _fingerprint(shaping: dict[str, Any], source: dict[str, Any], key: bytes | None) -> str:
    """Hash what shapes the shards; two keys differ in it, but it doesn't help to guess one."""
    key_hash = None if key is None else hashlib.sha256(b"composer_path fingerprint\0" + key).hexdigest()
    hashed = {"format_version": FORMAT_VERSION, "options": shaping, "source": source, "key": key_hash}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:32]


if __name__ == "__main__":
    import sys

    from composer_path.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
