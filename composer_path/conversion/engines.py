"""Who converts the partitions: processes of this machine, or the executors of Apache Spark.

Spark is an extra, `pip install 'composer_path[spark]'`. Its executors run the function that every other way of
converting runs, so the shards are the same. They need this package, the same sight of `--data`, `--images` and `--out`
(a shared disk or a bucket) and, in their environment, the bucket's credentials. The secret key of the hashes travels to
them through Spark.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator

from composer_path.conversion.input_scan import Partition
from composer_path.conversion.partition import ConvertJob, PartitionResult, convert_partition
from composer_path.conversion.rejected_file import ConvertError
from composer_path.parallel import Report, in_processes

Task = tuple[ConvertJob, Partition]

# Partitions for each of Spark's slots in one round: results are collected round by round, so that they need not all
# fit in memory, and few enough rounds that slots don't wait long for the slowest.
_ROUNDS_PER_SLOT = 4


def run_locally(tasks: Iterable[Task], workers: int, report: Report) -> Iterator[PartitionResult]:
    """Convert partitions in processes of this machine; yields the results in the order of the tasks."""
    return in_processes(_convert, tasks, workers, report)


def run_with_spark(tasks: Iterable[Task], master: str | None, report: Report) -> Iterator[PartitionResult]:
    """Convert partitions on Spark; yields the results in the order of the tasks, and reports each round's.

    `master` is Spark's address; None takes what spark-submit or Spark's own configuration says.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise ConvertError(
            "--engine spark: Spark must be installed, found no pyspark; pip install 'composer_path[spark]' (and Java)"
        ) from None
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # A Spark that somebody else has started stays as it is, and goes on after us.
    borrowed = SparkSession.getActiveSession() is not None
    builder = SparkSession.builder.appName("composer_path convert")
    if master is not None:
        builder = builder.master(master)
    try:
        session = builder.getOrCreate()
    except Exception as error:  # no Java, no master
        raise ConvertError(f"--engine spark: Spark must start, found {_first_line(error)}") from None
    try:
        context = session.sparkContext
        remaining = iter(tasks)
        while batch := list(itertools.islice(remaining, _ROUNDS_PER_SLOT * context.defaultParallelism)):
            try:
                results = context.parallelize(batch, len(batch)).map(_convert).collect()
            except Exception as error:  # Spark has repeated the task, and quotes the executor's error
                raise ConvertError(
                    f"--engine spark: all tasks must succeed, found {_first_line(error)}; convert again with --resume"
                ) from None
            for result in results:
                report(result.partition.num_records, 0 if result.done is None else result.done.counts["image_bytes"])
                yield result
    finally:
        if not borrowed:
            session.stop()


def _convert(task: Task, report: Report = lambda records, num_bytes: None) -> PartitionResult:
    return convert_partition(*task, report)


def _first_line(error: Exception) -> str:
    """Return the line of a Java stack that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if "composer_path" in line and "Error:" in line]
    return (ours or lines or [type(error).__name__])[0][:500]
