"""A parquet file, as Hugging Face's datasets write it, read row by row in bounded memory.

It is read with pyarrow, `pip install 'composer-path[parquet]'`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from composer_path.layouts.row import plain_key
from composer_path.records.rules import RecordError

_BATCH_ROWS = 16  # with pictures of a megabyte each, little enough for many processes
_PAGE_BYTES = 2**20


class ParquetMissing(ImportError):
    """pyarrow isn't installed. No fault of the file, so it ends a conversion at once."""


class ParquetFile:
    """Columns and rows of an open file; a `RecordError` ('invalid-table') says that it can't be read."""

    def __init__(self, file: Any) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ParquetMissing(
                "parquet files are read with pyarrow, which isn't installed here; pip install 'composer-path[parquet]'"
            ) from error
        self._errors = (pyarrow.ArrowException, OSError)
        try:
            self._file = parquet.ParquetFile(file, pre_buffer=False, buffer_size=_PAGE_BYTES)
            self.columns: list[str] = list(self._file.schema_arrow.names)
            metadata = self._file.metadata
            self._group_rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        except self._errors as error:
            raise _damaged() from error
        if len({plain_key(name) for name in self.columns}) < len(self.columns):
            raise RecordError("invalid-table", "columns of the same name", "give each column its own")

    def rows(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows from one number to another as plain values and bytes."""
        end = sum(self._group_rows) if end is None else end
        groups: list[int] = []  # those that hold some of the rows
        first = at = 0  # the first row of the first one
        for index, count in enumerate(self._group_rows):
            if at < end and at + count > start:
                first = first if groups else at
                groups.append(index)
            at += count
        if not groups:
            return
        at = first
        try:
            for batch in self._file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, use_threads=False):
                skipped, wanted = max(0, start - at), min(batch.num_rows, end - at)
                at += batch.num_rows
                if skipped >= batch.num_rows:
                    continue
                for row in batch.slice(skipped, wanted - skipped).to_pylist():
                    yield {name: _plain(value) for name, value in row.items()}
                if at >= end:
                    return
        except (*self._errors, UnicodeDecodeError, RecursionError) as error:
            raise _damaged() from error


def holds_bytes(value: Any) -> bool:
    """Whether bytes lie in a value where a record has none."""
    if isinstance(value, dict):
        return any(holds_bytes(one) for one in value.values())
    return isinstance(value, bytes) or (isinstance(value, list) and any(holds_bytes(one) for one in value))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, and bytes; NaN, which pandas writes for what is missing, becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value if value is None or isinstance(value, str | int | bytes) else str(value)


def _damaged() -> RecordError:
    return RecordError("invalid-table", "a parquet file that is truncated or damaged", "bring the file anew")
