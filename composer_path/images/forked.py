"""Processes that examine, forked from one that has imported what it takes: the first costs that, the others nothing.

The one that forks is started when it is needed, serves all processes that come of this one by forking, and ends with
the one that started it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass

from composer_path.images.examining_process import NUMBER
from composer_path.parallel import ProcessKilled

_CODE = """
import sys
sys.path[:] = {path!r}
from composer_path.images.examining_process import serve_forked
serve_forked({control})
"""
# Whoever doesn't answer for so long is given up; a busy machine may be slow.
_PATIENCE = 300.0

_lock = threading.Lock()
_source: tuple[socket.socket, subprocess.Popen[bytes]] | None = None


def _forget_lock() -> None:
    """Another thread of the parent may have had it as this process was forked."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


@dataclass
class ForkedProcess:
    """One of them, as its user sees it.

    Attributes:
        pid: Its number.
        report: Where it is told how it ended.
    """

    pid: int
    report: int
    _code: int | None = None

    def wait(self) -> int:
        """How it ended, as `Popen.wait` says it; by SIGKILL where nobody is left who knows."""
        if self._code is None:
            code = _read_number(self.report)
            self._code = -signal.SIGKILL if code is None else code
            os.close(self.report)
        return self._code

    def kill(self) -> None:
        """End it, whatever it does."""
        if self._code is None and not _is_told(self.report, 0.0):  # else its number may be another's by now
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def fork_process(pipe: int, file: int) -> ForkedProcess:
    """Have a process forked that serves a pipe and shares a file; both descriptors stay the caller's, too.

    Raises:
        ProcessKilled: The one that forks was killed, twice.
    """
    for _ in range(2):
        report, theirs = os.pipe()
        source = None
        try:
            source = _running_source()
            socket.send_fds(source, [b"+"], [pipe, file, theirs])
        except OSError:
            os.close(report)
            _forget(source)
            continue
        finally:
            os.close(theirs)
        if (pid := _read_number(report)) is not None:
            return ForkedProcess(pid, report)
        os.close(report)
        _forget(source)
    raise ProcessKilled("a process that starts others, which decode images, was killed, perhaps for lack of memory")


def end_source() -> None:
    """End the one that forks, and those it has forked."""
    _forget(None if _source is None else _source[0])


def _running_source() -> socket.socket:
    global _source
    with _lock:
        if _source is None:
            ours, theirs = socket.socketpair()
            with theirs:
                control = theirs.fileno()
                command = [sys.executable, "-c", _CODE.format(path=sys.path, control=control)]
                quiet = subprocess.DEVNULL  # libraries complain there, and may quote the file
                process = subprocess.Popen(command, pass_fds=[control], stdin=quiet, stdout=quiet, stderr=quiet)
            _source = ours, process
        return _source[0]


def _forget(source: socket.socket | None) -> None:
    """Let the next request start another one."""
    global _source
    with _lock:
        if _source is None or _source[0] is not source:
            return
        connection, process = _source
        _source = None
    connection.close()
    with suppress(OSError):
        process.kill()  # where it is a parent's, which shares it, too: the parent starts another
        process.wait()


def _read_number(report: int) -> int | None:
    """The next that is told; None where nobody tells any more."""
    if not _is_told(report, _PATIENCE):
        return None
    said = os.read(report, NUMBER.size)
    return NUMBER.unpack(said)[0] if len(said) == NUMBER.size else None


def _is_told(report: int, seconds: float) -> bool:
    """Whether there is something to read within so many seconds, its end included."""
    told = select.poll()
    told.register(report, select.POLLIN)
    return bool(told.poll(1000 * seconds))
