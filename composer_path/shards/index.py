"""A set's files by name, and how it is published: `index.json`, without which no reader finds anything, comes last."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from secrets import token_hex
from typing import Any

from composer_path.shards.columns import COLUMNS
from composer_path.shards.mds import Entry, ShardError
from composer_path.shards.writer import ShardWriter
from composer_path.storage.errors import StorageError
from composer_path.storage.lock import locked
from composer_path.storage.places import Bucket, Folder, open_place

INDEX_NAME = "index.json"
CARD_NAME = "dataset.json"
MANIFEST_NAME = "conversion.json"  # says, while a set is written, that it isn't finished, and which conversion it is
DONE_NAME = "done.json"  # a partition's marker
REPLACEMENT = ".replacement"  # folder of a set that is being written to take this one's place
IMAGE_HASHES_NAME = "image_hashes.bin"  # uint64 xxh64 of each stored image, by which repeated ones are counted

# What is written for a set, now or in an earlier version; anything else is never deleted.
_OURS = re.compile(
    rf"({re.escape(REPLACEMENT)}/)?"
    rf"(({INDEX_NAME}|{CARD_NAME}|{MANIFEST_NAME}|shard\.\d+\.mds"
    rf"|part-\d+/(shard\.\d+\.mds|{DONE_NAME}|{IMAGE_HASHES_NAME}))"
    r"|lengths-[0-9a-f]{16}\.part-\d+\.npz"
    r"|(part-\d+/)?\.[\w.]+\.unfinished)"
)
# Measured lengths, which lie beside an index; without use for another set, but never in its way.
_LENGTHS = re.compile(r"lengths-[0-9a-f]{16}\.npz")


@dataclass(kw_only=True)
class Part:
    """Shards of a set that lie in a folder of their own."""

    partition: int  # from 0
    files: list[dict[str, Any]]  # name in its folder, bytes and xxh64 of each file, its marker excepted
    shards: list[Entry]

    @property
    def name(self) -> str:
        """Its folder's name in the set."""
        return part_name(self.partition)


def part_name(partition: int) -> str:
    """Return the name of a partition's folder."""
    return f"part-{partition:05}"


def is_ours(name: str) -> bool:
    """Whether it is the name of a file that is written for a set."""
    return _OURS.fullmatch(name) is not None


def is_lengths(name: str) -> bool:
    """Whether it is the name of a file of measured lengths."""
    return _LENGTHS.fullmatch(name) is not None


def part_lengths_name(what: str, part: int) -> str:
    """Return the name of the lengths that one part of a conversion has counted; `what` is the hash of what for."""
    return f"lengths-{what}.part-{part:05}.npz"


def is_part_lengths(name: str) -> bool:
    """Whether it is such a name."""
    return is_ours(name) and name.startswith("lengths-")


@contextmanager
def held(place: Folder | Bucket, part: int | None = None) -> Iterator[None]:
    """Hold a place for one writer, or a part of it, from 1; a bucket has no locks, see `require_own`.

    A `StorageError` says that another process writes there, or that a link leads out of the folder.
    """
    if isinstance(place, Bucket):
        yield
        return
    with locked(place.path, "conversion", "wait for it, or choose another place", part):
        if links := place.links():
            found = f"{len(links)}, such as {links[0]!r}" if len(links) > 1 else repr(links[0])
            fix = "remove it, or choose another place"
            raise StorageError(f"{place}: must hold no symbolic link, found {found}; {fix}")
        yield


def require_own(place: Folder | Bucket, fingerprint: str) -> None:
    """Raise `StorageError` unless the unfinished set in a place is still that of the conversion of this fingerprint."""
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        if json.loads(place.read(MANIFEST_NAME))["fingerprint"] == fingerprint:
            return
    fix = "nothing was published; let one at a time write there, and convert again"
    raise StorageError(f"{place}: must be written by one conversion, found that another one has begun there; {fix}")


def publish(
    place: Folder | Bucket,
    parts: Iterable[Part],
    card: dict[str, Any],
    index_keys: Mapping[str, Any] | None = None,
    beside: Callable[[bytes], None] = lambda index: None,
) -> None:
    """Write data card and index of parts whose files have been verified, in their order, the index last.

    `beside` writes what belongs to just this index, and gets its content before it is there. A `StorageError` says that
    a file isn't there or has another size; there is no index then.
    """
    expected: dict[str, int | None] = {MANIFEST_NAME: None, CARD_NAME: None, INDEX_NAME: None}
    shards: list[Entry] = []
    for part in parts:
        expected |= {f"{part.name}/{file['name']}": file["bytes"] for file in part.files}
        expected[f"{part.name}/{DONE_NAME}"] = None
        shards += part.shards
    files = place.files()
    for name, size in expected.items():
        if size is not None and files.get(name) != size:
            found = "nothing" if name not in files else f"{files[name]} bytes"
            raise StorageError(f"{place}: {name} must be there with {size} bytes, found {found}; go on with --resume")
    place.delete([name for name in files if name not in expected and is_ours(name)])  # of a killed process
    place.sync(name for name, size in expected.items() if size is not None)
    write_json(place, CARD_NAME, card, durable=True)
    index = {**(index_keys or {}), "shards": shards, "version": 2}
    content = json.dumps(index, sort_keys=True).encode()
    beside(content)
    place.write(INDEX_NAME, [content], durable=True)
    place.delete([MANIFEST_NAME])


def write_json(place: Folder | Bucket, name: str, value: Mapping[str, Any], durable: bool = False) -> None:
    """Write a JSON object for people to read."""
    place.write(name, [(json.dumps(value, indent=2) + "\n").encode()], durable)


def empty_place(url: str) -> Folder | Bucket:
    """Return the place of a new set, where nothing may lie."""
    place = open_place(url)
    require_empty(place)
    return place


def require_empty(place: Folder | Bucket) -> None:
    """Raise `ShardError` if something lies there."""
    if place.files():
        raise ShardError(f"{place}: must be empty, found files; choose another place")


@contextmanager
def new_set(place: Folder | Bucket, size_limit: int, hashes: Sequence[str]) -> Iterator[ShardWriter]:
    """Write a set into an `empty_place`, up to `publish_new`; nothing is left there after a failure."""
    fingerprint = token_hex(16)
    with held(place):
        require_empty(place)
        place.write(MANIFEST_NAME, [json.dumps({"fingerprint": fingerprint}).encode()])
        own = partial(require_own, place, fingerprint)
        writer = ShardWriter(place, part_name(0), COLUMNS, size_limit, hashes, own)
        try:
            with closing(writer):  # a shard on its way arrives before all are deleted
                yield writer
        except BaseException:
            with suppress(StorageError):  # what lies there now is another one's
                own()
                place.delete([name for name in place.files() if is_ours(name)])
            raise


def publish_new(
    place: Folder | Bucket, writer: ShardWriter, card: dict[str, Any], index_keys: Mapping[str, Any] | None = None
) -> None:
    """Write the last shard of a new set, wait until all are verified, then write data card and index.

    The card comes without counts of files.
    """
    writer.finish()
    writer.require_own()
    num_bytes = sum(shard["raw_data"]["bytes"] for shard in writer.shards)
    card = {**card, "shards": len(writer.shards), "bytes": num_bytes, "partitions": 1}
    publish(place, [Part(partition=0, files=writer.files, shards=writer.shards)], card, index_keys)
