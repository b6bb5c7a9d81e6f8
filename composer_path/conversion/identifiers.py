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
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from composer_path.conversion.rejected_file import ConvertError
from composer_path.conversion.spill import SpilledRows
from composer_path.storage.atomic import write_whole

KEY_NAME = "identifiers.key"
MAPPING_SUFFIX = ".idmap.jsonl"

# 128 bits: no two of 10^9 values collide (chance 10^-21), and half the size of the full digest.
_HASH_HEX_DIGITS = 32

# Keys of a record's free `meta` object whose values are hashed, at any depth, and the kind they are.
# Spelling is compared in lower case with '-' and ' ' as '_'.
IDENTIFYING_KEYS = {
    "id": "id",
    **dict.fromkeys(("patient", "patient_id", "case", "case_id"), "patient"),
    **dict.fromkeys(("slide", "slide_id"), "slide"),
    **dict.fromkeys(("image", "file", "filename", "file_name"), "image"),
}


class KeyedHashes:
    """Hashes identifying values and remembers which value each hash stands for.

    Who has the key can test whether a name they guess is in the shards: keep it as safe as the names themselves.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.values: dict[tuple[str, str], str] = {}  # (kind, value) -> hash

    def hash(self, kind: str, value: str) -> str:
        """Return the hash of `value`, 32 hexadecimal digits: HMAC-SHA256 of kind and value, cut.

        The kind ('id', 'patient', 'slide', 'image') is part of it: a slide named like a patient has another.
        """
        digest = self.values.get((kind, value))
        if digest is None:
            message = f"{kind}\0{value}".encode()
            digest = hmac.new(self._key, message, hashlib.sha256).hexdigest()[:_HASH_HEX_DIGITS]
            self.values[kind, value] = digest
        return digest

    def hash_meta(self, value: Any, kind: str | None = None) -> Any:
        """Return a copy of a `meta` object with the values under `IDENTIFYING_KEYS` hashed.

        A list is hashed item by item, an object as a whole, because its keys may be names.
        """
        if isinstance(value, list):
            return [self.hash_meta(item, kind) for item in value]
        if kind is not None and value is not None:
            text = json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
            return self.hash(kind, text)
        if isinstance(value, dict):
            return {key: self.hash_meta(item, _kind_of(key)) for key, item in value.items()}
        return value


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


def _kind_of(key: str) -> str | None:
    return IDENTIFYING_KEYS.get(key.lower().replace("-", "_").replace(" ", "_"))


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
