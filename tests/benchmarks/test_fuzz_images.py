"""What mutated images come to: the short form, and what the long one found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fuzz_images import kinds, measure
from composer_path.records.rules import RULES


@pytest.mark.filterwarnings("ignore")
def test_mutated_images_are_accepted_with_their_pixels_or_refused_by_a_rule() -> None:
    found = measure(4 * len(kinds()), seed=7)
    assert set(found["outcomes"]) <= {"accepted", *RULES}
    assert found["outcomes"]["accepted"] > 10


def test_none_of_3000_was_anything_else(repo_root: Path) -> None:
    found = json.loads((repo_root / "benchmarks" / "results" / "fuzz_images.json").read_text())
    assert found["settings"]["images"] >= 3000 and found["settings"]["kinds"] >= 30
    assert set(found["outcomes"]) <= {"accepted", *RULES}
    assert found["peak_mb"] < 500 and found["slowest_seconds"] < 20
