"""Where a data set goes: what may lie there before, and how it is published when it is complete.

``conversion.json`` says which conversion the partitions belong to while it runs. ``index.json``, without which no
reader finds anything, is written last, after every file has been verified.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from composer_path.conversion.partition import DONE_NAME, IMAGE_HASHES_NAME
from composer_path.conversion.rejections import ConvertError
from composer_path.conversion.spill import SpilledRows
from composer_path.shards.columns import FORMAT_VERSION
from composer_path.storage.places import Bucket, Folder, StorageError

INDEX_NAME = "index.json"
CARD_NAME = "dataset.json"
MANIFEST_NAME = "conversion.json"

# What a conversion writes, now or in an earlier version; anything else is never deleted.
_OURS = re.compile(
    rf"({INDEX_NAME}|{CARD_NAME}|{MANIFEST_NAME}|shard\.\d+\.mds"
    rf"|part-\d+/(shard\.\d+\.mds|{DONE_NAME}|{IMAGE_HASHES_NAME}))"
    r"|(part-\d+/)?\.[\w.]+\.unfinished"
)
# What data_prep/measure_lengths.py lays beside a set's index; without use for another set, but never in its way.
LENGTHS_NAME = re.compile(r"lengths-[0-9a-f]{16}\.npz")


def prepare(
    place: Folder | Bucket, manifest: dict[str, Any], *, resume: bool, overwrite: bool, own: Collection[str]
) -> None:
    """Make sure that nothing foreign lies at the destination, and note which conversion this is.

    Args:
        place: the destination.
        manifest: ``fingerprint``, ``parts``, ``num_partitions`` and ``card``.
        resume: take over what the same conversion has left.
        overwrite: delete what any conversion has left.
        own: names of the partitions that this process will write; of all if ``parts`` is 1.

    Raises:
        ConvertError: files lie there that may not be touched.
    """
    files = place.files()
    several = manifest["parts"] > 1
    foreign = sorted(name for name in files if not (_OURS.fullmatch(name) or LENGTHS_NAME.fullmatch(name)))
    if foreign and (resume or overwrite or several):
        found = f"{len(foreign)} others, such as {foreign[0]!r}"
        raise ConvertError(f"--out {place}: must hold nothing but what a conversion wrote, found {found}; move them")
    if overwrite:
        # Without the index nothing can train on a part; the manifest goes last, for who is killed in between.
        place.delete(sorted(files, key=lambda name: (name != INDEX_NAME, name == MANIFEST_NAME)))
    elif files:
        begun = MANIFEST_NAME in files or INDEX_NAME in files
        if not resume and not (several and begun):
            fix = "empty it or choose another one, go on with --resume, or replace what is there with --overwrite"
            raise ConvertError(f"--out {place}: must be empty, found files; {fix}")
        _check_same(place, manifest, files)
        if not resume and any(name.partition("/")[0] in own for name in files):
            raise ConvertError(f"--out {place}: this part was begun before; go on with --resume")
    place.write(MANIFEST_NAME, [_json(manifest)])


def _check_same(place: Folder | Bucket, manifest: dict[str, Any], files: Collection[str]) -> None:
    if INDEX_NAME in files and manifest["parts"] > 1:
        raise ConvertError(f"--out {place}: the data set there is complete; choose another place")
    name = MANIFEST_NAME if MANIFEST_NAME in files else CARD_NAME
    if name not in files:
        return  # killed before it had begun; markers carry their own fingerprints
    found = read_json(place, name)
    if found.get("fingerprint") != manifest["fingerprint"]:
        raise ConvertError(
            f"--out {place}: must have been begun with the same input, options and key, found another conversion; "
            "repeat its command, or replace what is there with --overwrite"
        )
    if found.get("parts", manifest["parts"]) != manifest["parts"]:
        parts = f"{found['parts']} parts, and this is one of {manifest['parts']}"
        raise ConvertError(f"--out {place}: all parts must agree on their number, found {parts}")


def read_json(place: Folder | Bucket, name: str) -> dict[str, Any]:
    """Read a JSON object; an empty one if it is damaged or not there."""
    try:
        value = json.loads(place.read(name))
    except (FileNotFoundError, ValueError):
        value = {}
    return value if isinstance(value, dict) else {}


def publish(
    place: Folder | Bucket,
    dones: Iterable[dict[str, Any]],
    card: dict[str, Any],
    index_keys: Mapping[str, Any] | None = None,
) -> None:
    """Write data card and index of partitions whose files have been verified, the index last.

    Args:
        place: the destination.
        dones: the partitions' markers, in order.
        card: the data card.
        index_keys: what else stands in the index.

    Raises:
        StorageError: a file isn't there or has another size; there is no index then.
    """
    expected: dict[str, int | None] = {MANIFEST_NAME: None, CARD_NAME: None, INDEX_NAME: None}
    shards: list[dict[str, Any]] = []
    for done in dones:
        name = f"part-{done['partition']:05}"
        expected |= {f"{name}/{file['name']}": file["bytes"] for file in done["files"]}
        expected[f"{name}/{DONE_NAME}"] = None
        shards += done["shards"]
    files = place.files()
    for name, size in expected.items():
        if size is not None and files.get(name) != size:
            found = "nothing" if name not in files else f"{files[name]} bytes"
            raise StorageError(f"{place}: {name} must be there with {size} bytes, found {found}; go on with --resume")
    left = [name for name in files if name not in expected and _OURS.fullmatch(name)]
    place.delete(left)  # of a killed process
    place.sync(name for name, size in expected.items() if size is not None)
    place.write(CARD_NAME, [_json(card)], durable=True)
    index = {**(index_keys or {}), "shards": shards, "version": 2}
    place.write(INDEX_NAME, [json.dumps(index, sort_keys=True).encode()], durable=True)
    place.delete([MANIFEST_NAME])


def count_repeated_images(place: Folder | Bucket, dones: Iterable[dict[str, Any]]) -> int:
    """Count images that are equal to an earlier one, byte for byte as stored."""
    rows = SpilledRows()
    for done in dones:
        if any(file["name"] == IMAGE_HASHES_NAME for file in done["files"]):
            hashes = np.frombuffer(place.read(f"part-{done['partition']:05}/{IMAGE_HASHES_NAME}"), "<u8")
            for hash in hashes.tolist():
                rows.add(hash, hash.to_bytes(8, "little"))
    counts = (np.frombuffer(group, "<u8") for group in rows.groups())
    repeated = sum(len(hashes) - len(np.unique(hashes)) for hashes in counts)
    rows.close()
    return repeated


def ours(files: Iterable[str]) -> Iterator[str]:
    """Yield the names of files that a conversion writes."""
    yield from (name for name in files if _OURS.fullmatch(name))


def new_manifest(fingerprint: str, parts: int, num_partitions: int, card: dict[str, Any]) -> dict[str, Any]:
    """Describe a conversion: ``card`` is what of the data card is known before it has run."""
    return {
        "format": "composer_path",
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "parts": parts,
        "num_partitions": num_partitions,
        "card": card,
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
