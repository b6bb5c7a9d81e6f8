"""How far a long task is: a bar on a terminal for a conversion, else a line every ten seconds, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_SECONDS = 10.0
_NOUNS = {
    "looking at": "records looked at",
    "reading": "records read",
    "converting": "records converted",
    "verifying": "partitions verified",
}


class ConvertProgress:
    """Called by `convert` now and then; what is quick stays silent off a terminal. `stream` is stderr usually."""

    def __init__(self, stream: Any, bar: bool = True) -> None:
        self._stream, self._terminal = stream, bar and stream.isatty()
        self._bar: Any = None
        self._stage: str | None = None
        self._began = self._last = time.monotonic()

    def __call__(self, stage: str, count: int, total: int | None, num_bytes: int) -> None:
        """Report what is being done, how many of how many, and the bytes of images so far."""
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._began = stage, now
        seconds = max(now - self._began, 1e-9)
        megabytes = f"{num_bytes / 1e6:.1f} MB, {num_bytes / 1e6 / seconds:.1f} MB/s" if num_bytes else ""
        if self._terminal:
            self._draw(stage, count, total, megabytes)
        elif now - self._last >= _SECONDS:
            self._last = now
            left = f"{timedelta(seconds=round((total - count) * seconds / count))} left" if total and count else ""
            of = f" of {total} ({100 * count / total:.0f} %)" if total else ""
            parts = [f"{count}{of} {_NOUNS.get(stage, stage)}", f"{count / seconds:.0f}/s", megabytes, left]
            print(", ".join(filter(None, parts)), file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def _draw(self, stage: str, count: int, total: int | None, megabytes: str) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, desc=stage, unit="rec", unit_scale=True, file=self._stream, mininterval=0.2)
        self._bar.set_postfix_str(megabytes, refresh=False)
        self._bar.update(count - self._bar.n)


def every_ten_seconds(total: int, done: str) -> Callable[[int], None]:
    """Return a report of a count that has no bar; `done` is what is counted, as in "shards read"."""
    report = ConvertProgress(sys.stderr, bar=False)
    return lambda count: report(done, count, total, 0)
