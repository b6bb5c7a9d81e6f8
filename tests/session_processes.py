"""The processes that a command, started in a session of its own, left behind: there should be none."""

from __future__ import annotations

import time
from pathlib import Path


def processes_of(session: int) -> list[int]:
    """Those that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until_gone(session: int, seconds: float) -> None:
    """Workers notice after a moment that their parent was killed; fails if any doesn't."""
    end = time.monotonic() + seconds
    while processes_of(session) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_of(session) == []
