"""A set that takes a published one's place: written beside it, moved there when it is complete."""

from __future__ import annotations

from collections.abc import Sequence

from composer_path.conversion.partition import PartitionDone, verify_partition
from composer_path.shards.index import DONE_NAME, INDEX_NAME, MANIFEST_NAME, REPLACEMENT, is_lengths
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Bucket, Folder, open_place


def replacement_of(place: Folder | Bucket) -> Folder | Bucket:
    """Where the set that is to take a place's is written."""
    return open_place(place.path / REPLACEMENT if isinstance(place, Folder) else f"{place.url}/{REPLACEMENT}")


def take_place(place: Folder | Bucket, dones: Sequence[PartitionDone], *, whole: bool) -> None:
    """Move what was written beside a published set into its place, all partitions of which are then there.

    `dones` are those that were written; `whole` says that these are all. A `StorageError` says that one isn't as it was
    written: the published set is as it was then. Until the next `publish` there is no index, and a process that is
    killed in between leaves what `--resume` goes on with.
    """
    if not dones:
        return
    new = replacement_of(place)
    files = new.files()
    for done in dones:
        for file in done.files:
            if files.get(f"{done.name}/{file['name']}") != file["bytes"]:
                raise StorageError(f"{new}: {done.name}/{file['name']} must be there, found another; convert again")
    new.sync(f"{done.name}/{file['name']}" for done in dones for file in done.files)
    place.write(MANIFEST_NAME, [new.read(MANIFEST_NAME)], durable=True)
    place.delete([INDEX_NAME])
    if whole:  # parts of the set that goes must not be taken for the new one's
        place.delete([name for name in place.files() if is_lengths(name) or _is_marker(name)])
    for done in dones:
        if isinstance(place, Bucket) and isinstance(new, Bucket):
            place.take(new, done.name)
            verify_partition(place, done)
        elif isinstance(place, Folder) and isinstance(new, Folder):
            place.take(new, done.name)


def _is_marker(name: str) -> bool:
    return name.endswith(f"/{DONE_NAME}") and not name.startswith(f"{REPLACEMENT}/")
