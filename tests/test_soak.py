"""The soak's short form: kills at random and at the worst moments, and damage, each followed by the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import convert_shards

from benchmarks import soak

KINDS = ("stage 1, 2 ranks", "stage 2, 1 rank, mixture")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    class Outcomes(dict[str, Any]):
        """Those that are asked for."""

        def __missing__(self, kind: str) -> Any:
            trial = soak.Trial(tmp_path_factory.mktemp("undisturbed"), shards, kind)
            assert trial.run() == 0, trial.logged()[-3000:]
            self[kind] = trial.outcome()
            return self[kind]

    return Outcomes()


@pytest.mark.parametrize("kind", [pytest.param(KINDS[0], marks=pytest.mark.slow), KINDS[1]])
def test_killed_runs_end_bit_for_bit_as_the_undisturbed_one(
    kind: str, shards: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "KINDS", {kind: soak.KINDS[kind]})
    figures = soak.kills(tmp_path, shards, undisturbed, count=3, seed=3)
    assert sum(figures["kills"].values()) >= 3


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_by_the_command_and_the_run_ends_as_ever(
    shards: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "stage 2, 1 rank, mixture"
    monkeypatch.setattr(soak, "KINDS", {number: soak.KINDS[kind] for number in "abc"})
    same = dict.fromkeys("abc", undisturbed[kind])
    assert soak.damage(tmp_path, shards, same, count=2, seed=1) == {"cut": 1, "one bit": 1}
