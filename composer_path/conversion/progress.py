"""How far a long task is: a bar on a terminal for a conversion, else a line every ten seconds, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

_SECONDS = 10.0
_NOUNS = {"reading": "records read", "converting": "records converted", "verifying": "partitions verified"}


class ConvertProgress:
    """Called by `convert` now and then; short conversions stay silent off a terminal.

    Args:
        stream: File to show it in, stderr usually.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._bar: Any = None
        self._stage: str | None = None
        self._began = self._last = time.monotonic()

    def __call__(self, stage: str, count: int, total: int | None, num_bytes: int) -> None:
        """Report what is being done, how many of how many, and the bytes of images so far."""
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._began = stage, now
        if self._terminal:
            self._draw(stage, count, total, num_bytes)
        elif now - self._last >= _SECONDS:
            self._last = now
            print(self._line(stage, count, total, num_bytes, now), file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def _draw(self, stage: str, count: int, total: int | None, num_bytes: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, desc=stage, unit="rec", unit_scale=True, file=self._stream, mininterval=0.2)
        if num_bytes:
            self._bar.set_postfix_str(_megabytes(num_bytes, time.monotonic() - self._began), refresh=False)
        self._bar.update(count - self._bar.n)

    def _line(self, stage: str, count: int, total: int | None, num_bytes: int, now: float) -> str:
        seconds = max(now - self._began, 1e-9)
        of = f" of {total} ({100 * count / total:.0f} %)" if total else ""
        parts = [f"{count}{of} {_NOUNS[stage]}", f"{count / seconds:.0f}/s"]
        parts += [_megabytes(num_bytes, seconds)] if num_bytes else []
        parts += [f"{_duration((total - count) * seconds / count)} left"] if total and count else []
        return ", ".join(parts)


def _megabytes(num_bytes: int, seconds: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB, {num_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def every_ten_seconds(total: int, done: str) -> Callable[[int], None]:
    """A report that prints at most once in ten seconds; what is quick stays silent.

    Args:
        total: How many there are.
        done: What is counted, as in "shards read".
    """
    began = last = time.monotonic()

    def report(count: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS:
            last = now
            left = (total - count) * (now - began) / count
            print(f"{count} of {total} {done}, {left:.0f} s left", file=sys.stderr, flush=True)

    return report
