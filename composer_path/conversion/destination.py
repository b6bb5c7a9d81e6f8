"""Where a data set goes: what may lie there before, and which conversion it is that writes there."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_path.conversion.rejected_file import ConvertError
from composer_path.conversion.replacement import replacement_of
from composer_path.shards.columns import FORMAT_VERSION
from composer_path.shards.index import (
    CARD_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    REPLACEMENT,
    is_lengths,
    is_ours,
    write_json,
)
from composer_path.storage.errors import StorageError, shown
from composer_path.storage.places import Bucket, Folder, check_readable, is_remote, open_place


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Which conversion the partitions belong to, kept beside them while it runs."""

    format: str = "composer_path"
    format_version: int = FORMAT_VERSION
    fingerprint: str  # hash of the input and of every option that shapes the shards
    parts: int  # into how many it is divided
    num_partitions: int  # of all parts
    card: dict[str, Any]  # what of the data card is known before it has run


def read_manifest(place: Folder | Bucket) -> Manifest | None:
    """Read what a conversion has left; None if there is none, or no conversion wrote it."""
    try:
        return Manifest(**_read_json(place, MANIFEST_NAME))
    except TypeError:
        return None


def check_places(data: str, images: str, out: str) -> Folder | Bucket:
    """Check that there is something to read and a place to write, and return the place."""
    if is_remote(data):
        folder, _, name = data.rpartition("/")
        try:
            Bucket(folder).size(name)
        except (OSError, ValueError) as error:
            found = "no such object" if isinstance(error, FileNotFoundError) else error
            raise ConvertError(f"--data {shown(data)}: must be a JSON or JSONL file, found {found}") from None
    elif not Path(data).is_file():
        found = "a folder" if Path(data).is_dir() else "no such file"
        raise ConvertError(f"--data {data}: must be a JSON or JSONL file, found {found}")
    try:
        check_readable(images)
    except StorageError as error:
        raise ConvertError(f"--images {error}") from None
    if not is_remote(images) and not Path(images).is_dir():
        raise ConvertError(f"--images {images}: must be the folder of the images, found no such folder")
    try:
        place = open_place(out)
        if isinstance(place, Folder) and place.path.exists() and not place.path.is_dir():
            raise ConvertError(f"--out {out}: must be empty, found a file; choose another place")
    except StorageError as error:
        raise ConvertError(f"--out {shown(out)}: must be a writable place, found {error}") from None
    return place


def require_unused(place: Folder | Bucket) -> None:
    """Raise `ConvertError` if something lies at the destination."""
    try:
        used = bool(place.files())
    except StorageError as error:
        raise ConvertError(f"--out {place}: must be a writable place, found {error}") from None
    if used:
        raise _used(place)


def prepare(
    place: Folder | Bucket, manifest: Manifest, *, resume: bool, overwrite: bool, own: Collection[str]
) -> Folder | Bucket:
    """Make sure that nothing foreign lies at the destination, note which conversion this is, and say where it writes.

    To resume takes over what the same conversion has left, to overwrite takes the place of what any has left. A set
    that is published stays until a new one is complete, which is written beside it (`replacement`). `own` are the names
    of the partitions that this process will write: of all, if there is one part.
    """
    files = place.files()
    replacing = {name for name in files if name.startswith(f"{REPLACEMENT}/")}
    several = manifest.parts > 1
    foreign = sorted(name for name in files if not (is_ours(name) or is_lengths(name)))
    if foreign and (resume or overwrite or several):
        found = f"{len(foreign)} others, such as {foreign[0]!r}"
        raise ConvertError(f"--out {place}: must hold nothing but what a conversion wrote, found {found}; move them")
    target = place
    if overwrite:
        place.delete(sorted(replacing))
        if INDEX_NAME in files:
            target = replacement_of(place)
        else:
            place.delete(sorted(set(files) - replacing, key=lambda name: name == MANIFEST_NAME))
    elif resume and (replacing or (INDEX_NAME in files and not several)):
        target = replacement_of(place)
        begun_anew = f"{REPLACEMENT}/{MANIFEST_NAME}" in files
        _check_same(target if begun_anew else place, manifest, {name.removeprefix(f"{REPLACEMENT}/") for name in files})
    elif files:
        begun = MANIFEST_NAME in files or INDEX_NAME in files
        if not resume and not (several and begun):
            raise _used(place)
        _check_same(place, manifest, files)
        if not resume and any(name.partition("/")[0] in own for name in files):
            raise ConvertError(f"--out {place}: this part was begun before; go on with --resume")
    write_json(target, MANIFEST_NAME, vars(manifest))
    return target


def _used(place: Folder | Bucket) -> ConvertError:
    fix = "empty it or choose another one, go on with --resume, or replace what is there with --overwrite"
    return ConvertError(f"--out {place}: must be empty, found files; {fix}")


def _check_same(place: Folder | Bucket, manifest: Manifest, files: Collection[str]) -> None:
    if INDEX_NAME in files and manifest.parts > 1:
        raise ConvertError(f"--out {place}: the data set there is complete; choose another place")
    name = MANIFEST_NAME if MANIFEST_NAME in files else CARD_NAME
    if name not in files:
        return  # killed before it had begun; markers carry their own fingerprints
    found = _read_json(place, name)
    if found.get("fingerprint") != manifest.fingerprint:
        raise ConvertError(
            f"--out {place}: must have been begun with the same input, options and key, found another conversion; "
            "repeat its command, or replace what is there with --overwrite"
        )
    if found.get("parts", manifest.parts) != manifest.parts:
        parts = f"{found['parts']} parts, and this is one of {manifest.parts}"
        raise ConvertError(f"--out {place}: all parts must agree on their number, found {parts}")


def _read_json(place: Folder | Bucket, name: str) -> dict[str, Any]:
    """Read a JSON object; an empty one if it is damaged or not there."""
    try:
        value = json.loads(place.read(name))
    except (FileNotFoundError, ValueError):
        value = {}
    return value if isinstance(value, dict) else {}
