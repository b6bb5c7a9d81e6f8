"""A cut transfer goes on at exactly the byte that was asked for, or begins again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from composer_path.storage.errors import Fault, Stopped
from composer_path.storage.transfer import Answer, Limits, fetch

WHOLE = b"0123456789"


def limits(seconds: float = 10.0, stopped: bool = False) -> Limits:
    return Limits(1.0, time.monotonic() + seconds, lambda: stopped)


def server(content_range: str | None, first: int) -> Callable[[int], AbstractContextManager[Answer]]:
    """One that sends the bytes from one position on, and says so in its own way."""
    return lambda start: nullcontext(Answer(content_range, len(WHOLE) - first, iter([WHOLE[first:]])))


@pytest.mark.parametrize(
    ("content_range", "first"), [("bytes 4-9/10", 4), ("bytes 0-9/10", 0), (None, 0)], ids=["rest", "all", "no range"]
)
def test_what_was_cut_is_made_whole(content_range: str | None, first: int, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(WHOLE[:4])
    fetch(server(content_range, first), part, limits(), goes_on=True)
    assert part.read_bytes() == WHOLE


@pytest.mark.parametrize("first", [1, 3, 5, 40])
def test_bytes_that_were_not_asked_for_are_never_joined(first: int, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(WHOLE[:4])
    with pytest.raises(Fault, match="the bytes from 4 on were asked for, others came") as caught:
        fetch(server(f"bytes {first}-9/10", min(first, 9)), part, limits(), goes_on=True)
    assert (caught.value.rule, caught.value.transient) == ("cut", True)
    assert part.read_bytes() == b""  # the next attempt asks for all of it


@pytest.mark.parametrize("arrived", [0, 4])
def test_an_answer_that_ends_too_early_keeps_what_came(arrived: int, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(WHOLE[:arrived])
    answer = Answer(f"bytes {arrived}-9/10", 10 - arrived, iter([WHOLE[arrived:7]]))
    with pytest.raises(Fault, match="7 of 10 bytes arrived"):
        fetch(lambda start: nullcontext(answer), part, limits(), goes_on=True)
    assert part.read_bytes() == WHOLE[:7]


def test_an_attempt_ends_when_its_time_is_over_or_nobody_wants_it(tmp_path: Path) -> None:
    def silent() -> Iterator[bytes]:
        while True:
            yield b""

    for bound, error in ((limits(seconds=0.05), Fault), (limits(stopped=True), Stopped)):
        with pytest.raises(error):
            fetch(lambda start: nullcontext(Answer(None, None, silent())), tmp_path / "part", bound, goes_on=False)


def test_a_place_from_which_nothing_comes_is_unreachable_and_one_that_sends_a_little_too_slow(tmp_path: Path) -> None:
    def trickle(first: bytes) -> Iterator[bytes]:
        yield first
        while True:
            yield b""

    for first, rule in ((b"", "unreachable"), (b"0", "too-slow")):
        with pytest.raises(Fault) as caught:
            answer = Answer(None, None, trickle(first))
            fetch(lambda start, answer=answer: nullcontext(answer), tmp_path / "part", limits(0.05), goes_on=False)
        assert caught.value.rule == rule and caught.value.transient
