"""Writes MDS shards so that an index only ever appears beside a complete data set.

Streaming's own writer publishes an index even when the program failed half-way (its context manager calls
`finish` on an exception) or when a shard could not be uploaded. A reader then trains on a part unknowingly.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlparse

from composer_path.data.rejections import ConvertError

INFO_NAME = "dataset.json"


def is_remote(out: str) -> bool:
    """Whether ``out`` is a URI (``s3://bucket/folder``) and not a local folder."""
    return urlparse(out).scheme != ""


def refuse_used_output(out: str) -> None:
    """Check, before any work, that nothing lies where the shards will go.

    Raises:
        ConvertError: files lie there. Old shards would stay as orphans or be trained on.
    """
    if is_remote(out):
        from streaming.base.storage.upload import CloudUploader

        try:
            uploader = CloudUploader.get(out)
            shutil.rmtree(uploader.local)  # a temporary folder; the writer makes its own
            used = bool(uploader.list_objects())
        except NotImplementedError:  # some object stores can't be listed through streaming
            used = False
        except Exception as error:  # each store has its own errors; all mean that nothing can be written
            raise ConvertError(f"--out {out}: must be a writable place, found {error!r}") from error
    else:
        folder = Path(out)
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if used:
        raise ConvertError(f"--out {out}: must be empty, found files; empty it or choose another one")


class ShardWriter:
    """Context manager around streaming's MDSWriter: complete on ``finish``, nothing readable otherwise.

    A local data set is written to a folder beside ``out`` and renamed at the end (a killed process leaves
    that hidden folder). A remote one is uploaded shard by shard, and its index when every shard has arrived.

    Args:
        out: local folder (empty or not there) or URI.
        columns: MDS encoding of each column.
        size_limit: size of a shard in bytes, or text such as "64mb".
        hashes: checksums kept in the index, for ``StreamingDataset(validate_hash=...)``.
    """

    def __init__(self, out: str, columns: dict[str, str], size_limit: int | str, hashes: Sequence[str]) -> None:
        from streaming import MDSWriter

        class NonEmptyShards(MDSWriter):
            """MDSWriter that makes no shard of 0 samples before a first sample larger than the size limit."""

            def flush_shard(self) -> None:
                if self.new_samples:
                    super().flush_shard()

        self._out = out
        self._unfinished: Path | None = None
        target = out
        if not is_remote(out):
            final = Path(out).absolute()
            # The process id keeps two conversions apart; a leading dot keeps the folder out of sight.
            self._unfinished = final.with_name(f".{final.name}.unfinished-{os.getpid()}")
            shutil.rmtree(self._unfinished, ignore_errors=True)
            target = str(self._unfinished)
        # No compression: zstd saves nothing on JPEG and takes three times as long.
        keywords: dict[str, Any] = {"size_limit": size_limit, "hashes": sorted(hashes)}
        self._writer = NonEmptyShards(columns=columns, out=target, **keywords)
        self._done = False

    @property
    def shards(self) -> list[dict[str, Any]]:
        """The index entries of the shards written so far."""
        return self._writer.shards

    def write(self, sample: dict[str, Any]) -> None:
        """Add a sample.

        Raises:
            ConvertError: an earlier shard could not be uploaded.
        """
        if self._writer.event.is_set():
            raise self._upload_error()
        self._writer.write(sample)

    def finish(self, info: dict[str, Any]) -> None:
        """Write the last shard, ``dataset.json`` with ``info``, then the index, and put all in place.

        Raises:
            ConvertError: a file could not be uploaded; there is no index then.
        """
        writer = self._writer
        writer.flush_shard()
        writer.new_samples = []
        writer.executor.shutdown(wait=True)
        if writer.event.is_set():
            raise self._upload_error()
        info_file = Path(writer.local, INFO_NAME)
        info_file.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        writer.executor = ThreadPoolExecutor(max_workers=1)  # for the index; the old one took the shards
        try:
            writer.cloud_writer.upload_file(INFO_NAME)
            writer.finish()
        except Exception as error:  # the store's own error, or the bare Exception that streaming raises
            if self._unfinished is not None:
                raise
            raise self._upload_error() from error
        if self._unfinished is not None:
            _put_in_place(self._unfinished, Path(self._out))
        self._done = True

    def __enter__(self) -> ShardWriter:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Throw away what was not finished. Shards already uploaded stay, without an index."""
        if not self._done:
            self._writer.executor.shutdown(wait=True, cancel_futures=True)
            shutil.rmtree(self._writer.local, ignore_errors=True)

    def _upload_error(self) -> ConvertError:
        return ConvertError(
            f"--out {self._out}: every shard must be uploaded, found one that was not (the cause is "
            "above); there is no index, so nothing can train on a part; empty the folder and convert again"
        )


def _put_in_place(unfinished: Path, final: Path) -> None:
    try:
        os.replace(unfinished, final)  # also replaces an empty folder
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        # `final` is an (empty) mount point: file by file then, and the index last.
        files = sorted(unfinished.iterdir(), key=lambda path: path.name == "index.json")
        for path in files:
            shutil.move(path, final / path.name)
        unfinished.rmdir()
