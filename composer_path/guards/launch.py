"""Composer's launcher, for clusters that ask a run to stop: `python -m composer_path.guards.launch -n 8 train.py …`.

`composer` ends its ranks 30 s after it was signalled, however long a step and its checkpoint take. This one hands the
signal on and waits; what it does when a rank fails, and its words, are those of `composer`.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from types import FrameType

import psutil
from composer.cli import launcher

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def forward(number: int, frame: FrameType | None) -> None:
    """Hand a signal on to the ranks, which know what it means."""
    for rank in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def main() -> int:
    """Start the ranks and wait for them; returns the exit code of the first that failed, as a shell's, else 0."""
    for number in FORWARDED:
        signal.signal(number, forward)
    code = launcher.main()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
