"""What training refuses to begin with: the remains of another launcher."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from composer_path.commands.train import check_launch
from composer_path.guards.ending import Voice

SetOnly = Callable[[dict[str, str]], None]
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def set_only(monkeypatch: pytest.MonkeyPatch) -> SetOnly:
    def set_only(variables: dict[str, str]) -> None:
        for name in (*LAUNCHED, *ADDRESS):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


@pytest.mark.parametrize("variables", [{}, ADDRESS, {"RANK": "0"}, {"WORLD_SIZE": "1"}, LAUNCHED | ADDRESS])
def test_one_process_and_a_launchers_are_taken(variables: dict[str, str], set_only: SetOnly) -> None:
    set_only(variables)
    check_launch()


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"RANK": "1"}, "found RANK='1' without WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with .*, or unset RANK"),
        ({"WORLD_SIZE": "2"}, "found WORLD_SIZE='2' without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "3"}, "found LOCAL_RANK='3' without RANK"),
        (LAUNCHED, "found .* without MASTER_ADDR, MASTER_PORT"),
        (LAUNCHED | ADDRESS | {"RANK": "x"}, "found RANK='x', WORLD_SIZE='2'"),
    ],
)
def test_what_others_left_of_a_launcher_is_refused_by_name(
    variables: dict[str, str], found: str, set_only: SetOnly
) -> None:
    set_only(variables)
    with pytest.raises(ValueError, match=f"^environment: a launcher sets all of its variables, as numbers; {found}"):
        check_launch()
    assert Voice().ranks in (1, 2)  # of any verb, which says it
