"""Requests to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from composer_path.guards import launch
from composer_path.guards import requests as requests_module
from composer_path.guards.ending import INTERRUPTED, STOPPED, RunStopped
from composer_path.guards.requests import CTRL_C, TIME_IS_UP, StopRequests, code_of, seconds_of, words_of


@pytest.fixture
def requests() -> Iterator[StopRequests]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    found = StopRequests(["SIGTERM"], None)
    found.install()
    yield found
    found.restore()
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize(
    ("text", "seconds"), [("11.5h", 41400), ("90m", 5400), ("3600s", 3600), ("2d", 172800), (30, 30), ("45", 45)]
)
def test_durations_are_read(text: str | int | float, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "0h", "-3s", "1ep", "11:30", "1e3", "nan", -1, 0.0, "1h30m"])
def test_what_is_no_duration_is_refused(text: str | int | float) -> None:
    with pytest.raises(ValueError, match="which is no duration; write a number above 0 and a unit"):
        seconds_of(text)


def test_a_signal_within_steps_is_noted_and_the_same_one_again_at_once_is_one_request(
    requests: StopRequests, capfd: pytest.CaptureFixture[str]
) -> None:
    requests.before_steps = False
    assert requests.reason() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.reason() == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGINT)  # of Ctrl-C the launcher makes a SIGTERM, which may come first
    assert requests.reason() == requests.reason() == CTRL_C
    assert capfd.readouterr().err.count("\n") == 1


def test_a_signal_before_the_first_step_ends_the_start(requests: StopRequests) -> None:
    with pytest.raises(RunStopped, match="SIGTERM before the first step") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert stop.value.code == STOPPED


def test_a_library_that_takes_any_exception_for_its_own_doesnt_keep_a_start_from_ending(requests: StopRequests) -> None:
    with pytest.raises(RunStopped):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except Exception:
            pytest.fail("taken for a library's own")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_start_that_a_library_holds_is_ended_all_the_same(
    requests: StopRequests, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[int, ...]] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(requests_module, "end_now", lambda code, message="": ends.append((code, len(message) > 0)))
    monkeypatch.setattr(os, "kill", lambda process, number: ends.append((process, number)))
    requests.end_start(0.0)
    requests.first = int(signal.SIGTERM), time.monotonic() - 1.0
    requests.end_start(3.0)
    assert not ends
    requests.end_start(0.5)  # the handler, which would have settled it, hasn't come to its turn
    assert ends[0] == ((STOPPED, True) if rank == "0" else (os.getpid(), signal.SIGKILL))


def test_what_comes_while_the_run_ends_is_nothing(requests: StopRequests) -> None:
    requests.settled = True
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.reason() == 0


def test_the_clock_counts_from_the_start_of_the_process() -> None:
    assert StopRequests([], 0.001).reason() == TIME_IS_UP
    assert StopRequests([], 3600.0).reason() == 0


@pytest.mark.parametrize(("code", "reported"), [(0, 0), (75, 75), (-9, 137)])
def test_our_launcher_reports_a_killed_rank_as_shells_do(
    code: int, reported: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.launcher, "main", lambda: code)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launch.main() == reported


def test_codes_and_words() -> None:
    assert code_of(CTRL_C) == INTERRUPTED and code_of(signal.SIGTERM) == code_of(TIME_IS_UP) == STOPPED
    assert [words_of(reason) for reason in (signal.SIGUSR1, CTRL_C)] == ["SIGUSR1", "SIGINT"]
    assert words_of(TIME_IS_UP) == "guards.stop_after"
