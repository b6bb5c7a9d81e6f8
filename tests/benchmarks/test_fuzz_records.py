"""The fuzz's short form: every record ends in acceptance, which the loader reads back, or in a named rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from streaming_memory import _close_shared_memory  # noqa: F401 (a fixture)

from benchmarks import fuzz_records


@pytest.mark.parametrize("lines", [False, True])
def test_records_of_one_fault_are_accepted_or_refused_by_name(tmp_path: Path, lines: bool) -> None:
    found = fuzz_records.fuzz(tmp_path / "set", 300, seed=11 + lines, lines=lines)
    assert found["accepted"] >= 90 and found["refused"] >= 90 and found["made"]["deep"] == 6
    assert len(found["by rule"]) >= 15


def test_the_committed_result_is_of_10000_records() -> None:
    result = json.loads(fuzz_records.RESULTS.read_text())
    parts = [result["list"], result["lines"]]
    assert sum(part["records"] for part in parts) >= 10_000
    assert sum(part["made"]["deep"] for part in parts) >= 200
    assert all(part["read back with labels"] == part["accepted"] >= 0.3 * part["records"] for part in parts)
