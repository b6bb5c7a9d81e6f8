"""A manifest is read strictly: it decides what is whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from composer_path.checkpoints.manifest import Manifest, name_of, step_of

WHOLE = Manifest("a_run", 4, 1, {".metadata": (3, "aa"), "__0_0.distcp": (5, "bb")}, {"seed": 17}, [{"step": 2}], 0.5)


def test_what_is_written_is_read() -> None:
    assert Manifest.from_bytes(WHOLE.to_bytes()) == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"files": {}},
        {"files": {"../elsewhere": [1, "aa"]}},
        {"files": {"/etc/passwd": [1, "aa"]}},
        {"files": {"..": [1, "aa"]}},
        {"files": {"manifest.json": [1, "aa"]}},
        {"files": {"a": [1]}},
        {"files": {"a": ["many", "aa"]}},
        {"files": [["a", 1]]},
        {"files": None},
        {"step": "4"},
        {"run_id": None},
        {"fingerprint": []},
        {"history": {}},
        {"more": 1},
    ],
    ids=str,
)
def test_anything_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be 1, found 2|aren't those of a manifest"):
        Manifest.from_bytes(json.dumps(json.loads(WHOLE.to_bytes()) | change).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b'{"version": 1}'])
def test_what_is_no_manifest_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        Manifest.from_bytes(data)


def test_every_bit_is_looked_at() -> None:
    data = WHOLE.to_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            Manifest.from_bytes(bytes(changed))


def test_names_tell_the_step() -> None:
    assert name_of(1, 20) == "ep1-ba20" and step_of("ep1-ba20") == 20 and step_of("ep1-ba20-rank0.pt") == 20
    for other in (
        "latest",
        "ep1-ba20.damaged",
        ".ep1-ba20.unfinished",
        "ep1",
        "ep1-ba",
        "ep1-ba2x",
        "ep1-ba20-rank1.pt",
    ):
        assert step_of(other) is None, other
