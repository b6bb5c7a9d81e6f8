"""Progress of a conversion: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import io

import pytest

from composer_path.conversion import progress as convert_progress
from composer_path.conversion.progress import ConvertProgress


def test_off_a_terminal_a_line_comes_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(convert_progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    report = ConvertProgress(stream)
    report("reading", 1, None, 0)
    for count, seconds in enumerate([1, 9, 11, 12, 20, 22], start=1):
        now[0] = float(seconds)
        report("converting", count * 10, 100, count * 1_000_000)
    assert stream.getvalue().splitlines() == [
        "30 of 100 (30 %) records converted, 3/s, 3.0 MB, 0.3 MB/s, 0:00:23 left",
        "60 of 100 (60 %) records converted, 3/s, 6.0 MB, 0.3 MB/s, 0:00:14 left",
    ]


def test_on_a_terminal_there_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    report = ConvertProgress(stream)
    report("reading", 5, None, 0)
    report("converting", 50, 100, 5_000_000)
    report.close()
    shown = stream.getvalue()
    assert "converting:  50%" in shown
    assert "50.0/100" in shown
