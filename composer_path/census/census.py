"""Looks at all records and pictures as a conversion would read them, and writes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from composer_path.batches.measure import Measure
from composer_path.census.repetition import Repetition, Seen
from composer_path.census.tally import REPEATABLE, Tally, Tokens
from composer_path.conversion.image_source import ImageSource
from composer_path.conversion.input_scan import InputScan, Partition
from composer_path.conversion.options import ConvertOptions
from composer_path.conversion.partition import ConvertJob, load_record, records_of
from composer_path.conversion.rejected_file import ConvertError, Rejections
from composer_path.parallel import Report, in_processes, in_threads
from composer_path.records.conversation import Conversation
from composer_path.records.rules import RecordError

# Called with what is being done, records so far, records in all (None: not known yet) and bytes of images so far.
Progress = Callable[[str, int, int | None, int], None]


@dataclass(frozen=True)
class TokenCount:
    """Counts tokens as the training of a YAML would."""

    where: str  # the YAML's key whose settings count
    max_seq_len: int | None
    whole: Measure  # without a limit
    cut: Measure

    def __call__(self, conversation: Conversation) -> Tokens:
        """Of one record."""
        whole, (_, answers, _) = self.whole(conversation)[0], self.cut(conversation)
        return Tokens(whole, self.max_seq_len is not None and whole > self.max_seq_len, not answers)


@dataclass(frozen=True)
class Census:
    """What was found."""

    name: str  # of the input file
    bytes: int
    tally: Tally
    repetitions: dict[str, Repetition]
    duplicate_ids: int
    rejections: Rejections
    tokens: TokenCount | None


def take_census(
    data: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    tokens: TokenCount | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Census:
    """Look at every record and picture.

    Args:
        data: As `convert` takes it.
        images: Likewise.
        tokens: Counts tokens as a training would.
        progress: Called now and then.
        options: Those of `ConvertOptions`, by name.

    Raises:
        ConvertError: Nothing to read, or it can't be read as a whole.
        StorageError: A place failed.
    """
    chosen = ConvertOptions(**options)
    data, images = os.fspath(data), os.fspath(images)
    name = PurePosixPath(data).name
    report = progress or (lambda stage, records, total, num_bytes: None)
    rejections = Rejections(name)
    scan = InputScan(data, chosen.partition_size, lambda count: report("reading", count, None, 0), chosen.reading)
    if scan.problem is not None:
        raise ConvertError(f"{name}: {scan.problem}")
    if not scan.num_records:
        raise ConvertError(f"{name}: must hold a record, found none")
    partitions = list(scan.partitions())
    workers = max(1, min(chosen.workers, len(partitions)))
    threads = max(1, min(8, os.cpu_count() or 1) // workers)
    job = ConvertJob(data, images, "", chosen, "", None, threads, check_only=True)
    done = [0, 0]

    def count(records: int, num_bytes: int) -> None:
        done[0], done[1] = done[0] + records, done[1] + num_bytes
        report("looking at", done[0], scan.num_records, done[1])

    tally, seen = Tally(), {kind: Seen() for kind in REPEATABLE}
    for part, problems in in_processes(_look, [(job, one, tokens) for one in partitions], workers, count):
        tally.merge(part)
        for kind in REPEATABLE:
            seen[kind].add(part.seen[kind])
        for where, error in problems:
            rejections.add(where, None, error)
    duplicate_ids = sum(len(partition.duplicates) for partition in partitions)
    repetitions = {kind: one.repetition() for kind, one in seen.items()}
    return Census(name, scan.num_bytes, tally, repetitions, duplicate_ids, rejections, tokens)


def _look(task: tuple[ConvertJob, Partition, TokenCount | None], report: Report) -> tuple[Tally, list[Any]]:
    """Look at one partition; the problems come without the records."""
    job, partition, tokens = task
    tally, problems = Tally(), []
    images = ImageSource(job.images, job.options, job.threads)
    for loaded in in_threads(lambda record: load_record(images, record), records_of(job, partition), job.threads):
        record, conversation, stored, found, _ = loaded
        place = partition.duplicates.get(record.position or 0)
        if place is not None and job.options.duplicate_ids == "refuse":
            found = [*found, RecordError("duplicate-id", f"the id of {place}", "give it its own id", "id")]
        counted = tokens(conversation) if tokens is not None and conversation is not None and not found else None
        tally.add(record, conversation, stored, found, counted)
        problems += [(record.without_value(), error) for error in found]
        report(1, sum(len(image.data) for image in stored))
    return tally, problems
