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
from pathlib import Path
from typing import Any

from composer_path.data.rejections import ConvertError

KEY_NAME = "identifiers.key"
MAPPING_SUFFIX = ".idmap.jsonl"

# 128 bits: no two of 10^9 values collide (chance 10^-21), and half the size of the full digest.
_HASH_HEX_DIGITS = 32

# Keys of a record's free `meta` object whose values are hashed, at any depth, and the kind they are.
# Spelling is compared in lower case with '-' and ' ' as '_'.
IDENTIFYING_KEYS = {
    "id": "id",
    "patient": "patient",
    "patient_id": "patient",
    "case": "patient",
    "case_id": "patient",
    "slide": "slide",
    "slide_id": "slide",
    "image": "image",
    "file": "image",
    "filename": "image",
    "file_name": "image",
}


class KeyedHashes:
    """Hashes identifying values and remembers which value each hash stands for.

    Args:
        key_file: file with the secret key; made, readable by its owner only, when it does not exist. Who has
            it can test whether a name they guess is in the shards: keep it as safe as the names themselves.
        mapping_file: JSONL file of ``{kind, value, hash}`` that ``save_mapping`` writes.
    """

    def __init__(self, key_file: Path, mapping_file: Path) -> None:
        self.key_file = key_file
        self.mapping_file = mapping_file
        self._key = _read_or_make_key(key_file)
        self._values: dict[tuple[str, str], str] = {}

    def hash(self, kind: str, value: str) -> str:
        """Return the hash of ``value``, 32 hexadecimal digits: HMAC-SHA256 of kind and value, cut.

        The kind ('id', 'patient', 'slide', 'image') is part of it: a slide named like a patient has another.
        """
        digest = self._values.get((kind, value))
        if digest is None:
            message = f"{kind}\0{value}".encode()
            digest = hmac.new(self._key, message, hashlib.sha256).hexdigest()[:_HASH_HEX_DIGITS]
            self._values[kind, value] = digest
        return digest

    def hash_meta(self, meta: Any) -> Any:
        """Return a copy of a ``meta`` object with the values under ``IDENTIFYING_KEYS`` hashed.

        A list is hashed item by item, an object as a whole, because its keys may be names.
        """
        return self._hash_nested(meta, kind=None)

    def _hash_nested(self, value: Any, kind: str | None) -> Any:
        if isinstance(value, list):
            return [self._hash_nested(item, kind) for item in value]
        if kind is not None and value is not None:
            text = json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
            return self.hash(kind, text)
        if isinstance(value, dict):
            return {key: self._hash_nested(item, _kind_of(key)) for key, item in value.items()}
        return value

    def save_mapping(self) -> None:
        """Add this run's values to the mapping file, readable by its owner only; older entries stay."""
        if self.mapping_file.exists():
            for line in self.mapping_file.read_text("utf-8").splitlines():
                entry = json.loads(line)
                self._values.setdefault((entry["kind"], entry["value"]), entry["hash"])
        # Written beside and renamed: a full disk must not cost the mapping of an earlier conversion.
        unfinished = self.mapping_file.with_name(self.mapping_file.name + ".unfinished")
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            for (kind, value), digest in self._values.items():
                file.write(json.dumps({"kind": kind, "value": value, "hash": digest}) + "\n")
        unfinished.replace(self.mapping_file)


def _kind_of(key: str) -> str | None:
    return IDENTIFYING_KEYS.get(key.lower().replace("-", "_").replace(" ", "_"))


def _read_or_make_key(key_file: Path) -> bytes:
    try:
        # O_EXCL: of two conversions that start together one makes the key and the other reads it.
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
    try:
        key = bytes.fromhex(key_file.read_text("ascii").strip())
    except ValueError:
        key = b""
    if len(key) < 32:
        raise ConvertError(
            f"{key_file}: a key must be 64 hexadecimal digits, found something else; put the right file "
            "back, or delete it to have a new key made (its hashes won't match those of earlier conversions)"
        )
    return key
