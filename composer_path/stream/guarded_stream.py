"""A set of shards whose files arrive whole or end in a named error, within a bound of time."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format import FileInfo, Reader
from streaming.base.world import World

from composer_path.storage.errors import Fault, Stopped
from composer_path.storage.places import Bucket, Folder, check_readable, is_remote, open_place, shown
from composer_path.storage.transfer import Limits, cache_fault
from composer_path.stream.error import StreamError
from composer_path.stream.stored_file import check_file, pick_hash

log = logging.getLogger(__name__)

FAULT_TIMEOUT = 180.0  # s; a rank that waits for another gives up after trainer.dist_timeout, 300 s by default
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
        self,
        *,
        local: str,
        remote: str | None = None,
        fault_timeout: float = FAULT_TIMEOUT,
        name: str = "",
        **stream: Any,
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
        # Set afterwards, as Streaming refuses what its own clients can't reach; none of them is used.
        self.remote = None if remote is None else remote.rstrip("/")
        if self._keep_zip is not None:
            self.safe_keep_zip = self._keep_zip or remote is None
        self.name = name
        self.fault_timeout = fault_timeout
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
        return str(self.folder if self._source is None else self._source)

    def error(self, shard: str, fault: Fault, attempts: int = 1, seconds: float = 0.0) -> StreamError:
        """The named error of a fault."""
        tries = f" (after {attempts} attempts in {seconds:.0f} s)" if attempts > 1 else ""
        where = str(self.folder) if fault.rule.startswith("cache-") else self.where
        return StreamError.of(shard, fault.rule, where, fault.found + tries, fault.fix)

    def bring(
        self, name: str, check: Callable[[Path], None], to: Path | None = None, patience: float | None = None
    ) -> None:
        """Bring a file into the cache; it appears there when it is complete and has passed its check.

        Args:
            name: Of the file in the set.
            check: Raises `Fault` if a file isn't the one that is meant.
            to: Where to, by default its place in the cache.
            patience: Seconds, by default `fault_timeout`.

        Raises:
            StreamError: It didn't come in time, or can't come.
            Stopped: Another process failed meanwhile.
        """
        start, pause, mismatches, attempts = time.monotonic(), 0.2, 0, 0
        seconds = self.fault_timeout if patience is None else min(patience, self.fault_timeout)
        limits = Limits(min(self.download_timeout, seconds), start + seconds, self.stopped)
        source = self._source
        assert source is not None
        part = self._part_of(name)
        try:
            while True:
                attempts += 1
                try:
                    source.fetch(name, part, limits)
                    try:
                        check(part)
                    except Fault:
                        part.unlink(missing_ok=True)
                        mismatches += 1
                        raise
                    os.replace(part, to or self.folder / name)
                    return
                except Fault as fault:
                    left = limits.deadline - time.monotonic()
                    if not fault.transient or mismatches == _MISMATCHES or left <= 0:
                        raise self.error(name, fault, attempts, time.monotonic() - start) from None
                    wait = min(pause * random.uniform(0.7, 1.0), left)
                    what = f"{name} of {self.where}: {fault.rule}: {fault.found}"
                    log.warning("%s; attempt %d follows", what, attempts + 1)
                except OSError as error:
                    raise self.error(name, cache_fault(error)) from None
                self._sleep(wait)
                pause = min(2 * pause, 10.0)
        finally:
            part.unlink(missing_ok=True)

    def _part_of(self, name: str) -> Path:
        return self.folder / f"{name}.{os.getpid()}-{random.getrandbits(32):08x}.part"

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.stopped():
                raise Stopped
            time.sleep(min(left, 0.1))

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """The index's shards; anything wrong with it is a named error."""
        try:
            shards = super().get_shards(world, allow_unsafe_types)
            if not sum(map(len, shards)):
                raise ValueError("it holds no sample")
        except StreamError:
            raise
        except Exception as error:
            fix = "convert the data again" if self.remote is None else "delete this cache folder, or convert again"
            found = f"{type(error).__name__}: {error}"
            raise StreamError.of("index.json", "index", str(self.folder), found, fix) from None
        for shard in shards:
            for info in (info for pair in shard.file_pairs for info in pair if info is not None):
                self._hash_of(info)
        return shards

    def _hash_of(self, info: FileInfo) -> tuple[str, str] | None:
        """The checksum that this file is checked with: name and value."""
        try:
            return pick_hash(info.hashes, self.validate_hash)
        except Fault as fault:
            raise self.error(info.basename, fault) from None

    def prepare_shard(self, shard: Reader) -> int:
        """Have a shard's files in the folder, whole and checked, and return the change of the cache's size in bytes."""
        return sum(self._prepare_part(raw, zipped, shard.compression) for raw, zipped in shard.file_pairs)

    def _prepare_part(self, raw: FileInfo, zipped: FileInfo | None, compression: str | None) -> int:
        good, delta = self.look(raw)
        if not good and zipped is None:
            delta += self._bring(raw)
        elif not good and zipped is not None:
            good, change = self.look(zipped)
            delta += change + (0 if good else self._bring(zipped)) + self._decompress(raw, zipped, compression)
        if zipped is not None and not self.safe_keep_zip and (self.folder / zipped.basename).exists():
            os.remove(self.folder / zipped.basename)
            delta -= zipped.bytes
        return delta

    def _bring(self, info: FileInfo) -> int:
        if self._source is None:
            fault = Fault("missing", "there is no such file", "copy it there again, or convert the data again")
            raise self.error(info.basename, fault)
        self.bring(info.basename, lambda path: check_file(path, info.bytes, self._hash_of(info)))
        return info.bytes

    def look(self, info: FileInfo) -> tuple[bool, int]:
        """Whether a file is there and whole, and the change of the cache's size: a damaged one is removed from a cache.

        Without a remote to have it from again, a damaged one is a `StreamError`.
        """
        path = self.folder / info.basename
        if not path.is_file():
            return False, 0
        try:
            check_file(path, info.bytes, self._hash_of(info))
        except Fault as fault:
            if self._source is None:
                raise self.error(info.basename, fault) from None
            log.warning("%s in the cache: %s: %s; it is fetched again", path, fault.rule, fault.found)
            path.unlink(missing_ok=True)
            return False, -info.bytes
        except OSError as error:
            raise self.error(info.basename, cache_fault(error)) from None
        return True, 0

    def _decompress(self, raw: FileInfo, zipped: FileInfo, compression: str | None) -> int:
        part = self._part_of(raw.basename)
        try:
            part.write_bytes(decompress(compression, (self.folder / zipped.basename).read_bytes()))
            check_file(part, raw.bytes, self._hash_of(raw))
            os.replace(part, self.folder / raw.basename)
        except Fault as fault:
            raise self.error(zipped.basename, fault) from None
        except OSError as error:
            raise self.error(zipped.basename, cache_fault(error)) from None
        finally:
            part.unlink(missing_ok=True)
        return raw.bytes
