"""Keyed hashes that stand for identifying values (ids, patients, slides, file names) in shards.

The same value gets the same hash as long as the key is the same, so that one can still see that two records
are of one patient, also across data sets, without learning which. Key and mapping stay on this machine.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from composer_path.conversion.identifying_keys import kind_of
from composer_path.conversion.rejected_file import ConvertError
from composer_path.conversion.spill import SpilledRows
from composer_path.records.key_names import canonical, shown_identifier
from composer_path.storage.atomic import write_whole

KEY_NAME = "identifiers.key"
MAPPING_SUFFIX = ".idmap.jsonl"

# 128 bits: no two of 10^9 values collide (chance 10^-21), and half the size of the full digest.
_HASH_HEX_DIGITS = 32

# The most names of keys that are counted one by one; a file may have as many as it has records.
MAX_KEYS = 100
OTHER_KEYS = "(others)"


class KeyedHashes:
    """Hashes identifying values and remembers which value each hash stands for.

    Who has the key can test whether a name they guess is in the shards: keep it as safe as the names themselves.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.values: dict[tuple[str, str], str] = {}  # (kind, value) -> hash

    def hash(self, kind: str, value: str) -> str:
        """Return the hash of `value`, 32 hexadecimal digits: HMAC-SHA256 of kind and value, cut.

        The kind ('id', 'patient', 'slide', 'image', ...) is part of it: a slide named like a patient has another.
        """
        digest = self.values.get((kind, value))
        if digest is None:
            message = f"{kind}\0{value}".encode()
            digest = hmac.new(self._key, message, hashlib.sha256).hexdigest()[:_HASH_HEX_DIGITS]
            self.values[kind, value] = digest
        return digest

    def hash_meta(self, value: Any, kind: str | None = None) -> Any:
        """Return a copy of a `meta` object with the values under identifying keys hashed.

        A list is hashed item by item, an object as a whole, because its keys may be names.
        """
        if isinstance(value, list):
            return [self.hash_meta(item, kind) for item in value]
        if kind is not None and value is not None:
            text = json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
            return self.hash(kind, text)
        if isinstance(value, dict):
            return {key: self.hash_meta(item, found) for key, item, found in _with_kinds(value)}
        return value


def keys_of_meta(value: Any, *, hashed: bool) -> tuple[set[str], set[str]]:
    """Return the keys in a `meta` object whose values are kept, and those that are hashed, as they may be shown."""
    kept: set[str] = set()
    away: set[str] = set()
    if isinstance(value, list):
        for item in value:
            for names, more in zip((kept, away), keys_of_meta(item, hashed=hashed), strict=True):
                names |= more
    elif isinstance(value, dict):
        for key, item, kind in _with_kinds(value):
            if hashed and kind is not None:
                away.add(shown_identifier(key))
                continue
            below = keys_of_meta(item, hashed=hashed)
            kept |= below[0] or ({shown_identifier(key)} if not below[1] else set())
            away |= below[1]
    return kept, away


def count_keys(counts: dict[str, int], keys: Iterable[str]) -> None:
    """Count each key once, those of names that come after the first hundred together."""
    for key in {key if key in counts or len(counts) < MAX_KEYS else OTHER_KEYS for key in sorted(keys)}:
        counts[key] = counts.get(key, 0) + 1


class MappingFile:
    """The file that leads from hashes back to values: one line of `{kind, value, hash}` for each.

    Entries go through temporary files, so that millions need no memory; those of earlier conversions stay.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = SpilledRows()

    def add(self, values: dict[tuple[str, str], str]) -> None:
        """Add what a `KeyedHashes` has hashed."""
        for (kind, value), digest in values.items():
            self._add({"kind": kind, "value": value, "hash": digest})

    def save(self) -> None:
        """Write the file, readable by its owner only, each entry once."""
        if self.path.exists():
            with open(self.path, encoding="utf-8") as file:
                for line in file:
                    self._add(json.loads(line))

        def write(file: BinaryIO) -> None:
            for group in self._rows.groups():
                file.writelines(sorted(set(group.splitlines(keepends=True))))

        write_whole(self.path, write, mode=0o600)  # a full disk must not cost the mapping of an earlier conversion
        self._rows.close()

    def _add(self, entry: dict[str, str]) -> None:
        entry = {key: entry[key] for key in ("kind", "value", "hash")}
        self._rows.add(int(entry["hash"], 16), (json.dumps(entry) + "\n").encode("ascii"))


def _with_kinds(found: dict[str, Any]) -> Iterator[tuple[str, Any, str | None]]:
    """Yield key, value and kind of each entry; of {"name": "PatientID", "value": ...} the kind of what is named."""
    named = {canonical(key): item for key, item in found.items()}
    kinds = (kind_of(str(named[key])) for key in _NAMES_A_KEY if isinstance(named.get(key), str))
    kind = next(filter(None, kinds), None)
    pair = kind is not None and not _VALUES.isdisjoint(named)
    for key, item in found.items():
        spelled = canonical(key)
        if pair and spelled in (*_NAMES_A_KEY, *_VALUES):
            yield key, item, kind if spelled in _VALUES else None
        else:
            yield key, item, kind_of(key)


# Of entries that say by a value which key they are.
_NAMES_A_KEY = ("name", "key", "keyword", "tag", "field", "attribute")
_VALUES = frozenset(("value", "values", "val", "text"))


def read_or_make_key(key_file: Path) -> bytes:
    """Read the secret key; made, readable by its owner only, where the file does not exist."""
    # Of two conversions that start together one makes the key and the other reads it.
    opener = partial(os.open, mode=0o600)
    with suppress(FileExistsError), open(key_file, "x", encoding="ascii", opener=opener) as file:
        file.write(secrets.token_hex(32) + "\n")
    key = b""
    with suppress(ValueError):
        for _ in range(20):  # the other one may not have written it yet
            if key := bytes.fromhex(key_file.read_text("ascii").strip()):
                break
            time.sleep(0.05)
    if len(key) < 32:
        raise ConvertError(
            f"{key_file}: a key must be 64 hexadecimal digits, found something else; put the right file "
            "back, or delete it to have a new key made (its hashes won't match those of earlier conversions)"
        )
    return key
