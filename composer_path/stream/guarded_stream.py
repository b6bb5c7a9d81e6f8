"""A set of shards whose files arrive whole or end in a named error, within a bound of time."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format import FileInfo, Reader
from streaming.base.world import World

from composer_path.shards.mds import leads_out
from composer_path.storage.errors import Fault, Stopped, cache_fault, shown
from composer_path.storage.places import Bucket, Folder, check_readable, is_remote, open_place
from composer_path.storage.transfer import Limits
from composer_path.stream.error import StreamError
from composer_path.stream.stored_file import check_file, pick_hash

log = logging.getLogger(__name__)

PATIENCE = 180.0  # s; a rank that waits for another gives up after trainer.dist_timeout, 300 s by default
# Bytes that don't have their hash are asked for again, in case they changed on their way; the file itself may be wrong.
_MISMATCHES = 3


def cache_folder(address: str) -> Path:
    """Folder for the cache of a set that is given by its address alone; the same on every machine and in every run."""
    root = os.environ.get("COMPOSER_PATH_CACHE") or "~/.cache/composer_path"
    name = hashlib.sha256(address.rstrip("/").replace("gcs://", "gs://", 1).encode()).hexdigest()[:16]
    return Path(root).expanduser() / "shards" / name


class GuardedStream(Stream):
    """One set of shards: a cache folder and where its files come from.

    Args:
        local: Folder of the shards, or of their cache; or the shards' address, which then get a cache folder of their
            own, `shards/<hash of the address>` in `$COMPOSER_PATH_CACHE` or `~/.cache/composer_path`.
        remote: Folder or address that they come from; None if they lie in `local`.
        fault_timeout: Seconds in which a file must have arrived, all attempts together.
        name: What it is called in logs; for mixtures.
        **stream: Keywords of `streaming.Stream`.

    Raises:
        ValueError: Both are addresses.
        StorageError: Nothing can read an address of this scheme.
    """

    def __init__(
        self, *, local: str, remote: str | None = None, fault_timeout: float = PATIENCE, name: str = "", **stream: Any
    ) -> None:
        remote = None if remote == local else remote
        if is_remote(local):
            if remote is not None:
                rule = f"local: must be a folder where remote is given, found {shown(local)}"
                raise ValueError(f"{rule}; name a folder for the cache, or leave remote out")
            local, remote = str(cache_folder(local)), local
        if remote is not None:
            check_readable(remote)
        super().__init__(local=local, **stream)
        self.share = {
            key: stream.get(key) for key in ("proportion", "repeat", "choose")
        }  # Streaming writes over its own
        # Set afterwards, as Streaming refuses what its own clients can't reach; none of them is used.
        self.remote = None if remote is None else remote.rstrip("/")
        self.safe_keep_zip = bool(self._keep_zip) or remote is None
        self.name, self.fault_timeout = name, fault_timeout
        self.stopped: Callable[[], bool] = bool  # no

    @property
    def folder(self) -> Path:
        """Where its files lie on this machine."""
        return Path(self.local, self.split)

    @property
    def _source(self) -> Folder | Bucket | None:
        """Where its files come from; a data set may set the split later."""
        return None if self.remote is None else open_place("/".join(filter(None, (self.remote, self.split))))

    @property
    def where(self) -> str:
        """Its place in messages."""
        return str(self._source or self.folder)

    def error(self, shard: str, cause: Fault | OSError, tries: str = "") -> StreamError:
        """The named error of a fault, or of what the cache's disk refused."""
        fault = cause if isinstance(cause, Fault) else cache_fault(cause)
        where = str(self.folder) if fault.rule.startswith("cache-") else self.where
        return StreamError.of(shard, fault.rule, where, fault.found + tries, fault.fix)

    def bring(
        self, name: str, check: Callable[[Path], None], to: Path | None = None, patience: float | None = None
    ) -> None:
        """Bring a file into the cache, where it appears when it is complete and has passed its check.

        If it can't come, or not within `patience` (seconds; by default, and at most, `fault_timeout`), `StreamError` is
        raised; `Stopped` if another process failed meanwhile.
        """
        start, pause, mismatches = time.monotonic(), 0.2, 0
        seconds = self.fault_timeout if patience is None else min(patience, self.fault_timeout)
        limits = Limits(min(self.download_timeout, seconds), start + seconds, self.stopped)
        source = self._source
        assert source is not None
        with self._part_of(name) as part:
            for attempt in itertools.count(1):
                try:
                    source.fetch(name, part, limits)
                    try:
                        check(part)
                    except Fault:
                        part.unlink()
                        mismatches += 1
                        raise
                    os.replace(part, to or self.folder / name)
                    return
                except OSError as error:
                    raise self.error(name, error) from None
                except Fault as fault:
                    took = time.monotonic() - start
                    if not fault.transient or mismatches == _MISMATCHES or took >= seconds:
                        tries = f" (after {attempt} attempts in {took:.0f} s)" if attempt > 1 else ""
                        raise self.error(name, fault, tries) from None
                    what = f"{name} of {self.where}: {fault.rule}: {fault.found}"
                    log.warning("%s; attempt %d follows", what, attempt + 1)
                resume = time.monotonic() + min(pause * random.uniform(0.7, 1.0), seconds - took)
                while (now := time.monotonic()) < resume:
                    if self.stopped():
                        raise Stopped
                    time.sleep(min(resume - now, 0.1))
                pause = min(2 * pause, 10.0)

    @contextmanager
    def _part_of(self, name: str) -> Iterator[Path]:
        """Where a file may lie while it isn't complete; what is left of it goes."""
        part = self.folder / f"{name}.{os.getpid()}-{random.getrandbits(32):08x}.part"
        try:
            yield part
        finally:
            with suppress(OSError):
                part.unlink()

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """The index's shards; anything wrong with it is a named error."""
        try:
            shards = super().get_shards(world, allow_unsafe_types)
            if not sum(map(len, shards)):
                raise ValueError("it holds no sample")
        except Exception as error:
            fix = "convert the data again" if self.remote is None else "delete this cache folder, or convert again"
            found = f"{type(error).__name__}: {error}"
            raise StreamError.of("index.json", "index", str(self.folder), found, fix) from None
        for info in (info for shard in shards for pair in shard.file_pairs for info in pair if info is not None):
            try:
                if leads_out(info.basename):
                    raise Fault("index", "it names a shard outside of the folder", "convert the data again")
                pick_hash(info.hashes, self.validate_hash)
            except Fault as fault:
                raise self.error(info.basename, fault) from None
        return shards

    def prepare_shard(self, shard: Reader) -> int:
        """Have a shard's files in the folder, whole and checked, and return the change of the cache's size in bytes."""
        before = self._size_of(shard)
        for raw, zipped in shard.file_pairs:
            if not self.is_whole(raw):
                if zipped is None:
                    self._bring(raw)
                else:
                    if not self.is_whole(zipped):
                        self._bring(zipped)
                    self._decompress(raw, zipped, shard.compression)
            if zipped is not None and not self.safe_keep_zip:
                (self.folder / zipped.basename).unlink(missing_ok=True)
        return self._size_of(shard) - before

    def _size_of(self, shard: Reader) -> int:
        """Bytes of a shard's files that are there."""
        infos = (info for pair in shard.file_pairs for info in pair if info is not None)
        return sum(info.bytes for info in infos if (self.folder / info.basename).is_file())

    def is_whole(self, info: FileInfo) -> bool:
        """Whether a file is there and as the index says; a damaged one is removed from a cache, else an error."""
        path = self.folder / info.basename
        if not path.is_file():
            return False
        try:
            check_file(path, info, self.validate_hash)
        except (Fault, OSError) as cause:
            if self.remote is None or isinstance(cause, OSError):
                raise self.error(info.basename, cause) from None
            log.warning("%s in the cache: %s: %s; it is fetched again", path, cause.rule, cause.found)
            path.unlink(missing_ok=True)
            return False
        return True

    def _bring(self, info: FileInfo) -> None:
        if self.remote is None:
            fix = "copy it there again, or convert the data again"
            raise self.error(info.basename, Fault("missing", "there is no such file", fix))
        self.bring(info.basename, lambda path: check_file(path, info, self.validate_hash))

    def _decompress(self, raw: FileInfo, zipped: FileInfo, compression: str | None) -> None:
        with self._part_of(raw.basename) as part:
            try:
                part.write_bytes(decompress(compression, (self.folder / zipped.basename).read_bytes()))
                check_file(part, raw, self.validate_hash)
                os.replace(part, self.folder / raw.basename)
            except (Fault, OSError) as cause:
                raise self.error(zipped.basename, cause) from None
