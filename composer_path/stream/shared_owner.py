"""Who owns the shared memory that stands under a number: locked by a living process, else left by a killed one.

A lock of the kernel ends with the last process that has it, those that the owner forked included. So what is to be
removed can be told from what another run uses, also where that one can't be seen, as in another container.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK

MEMORY = Path("/dev/shm")  # where Linux shows what is shared by name
OWNER = "owner"
_LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)
_OLD = 60.0  # s; each use of a lock's file makes it new


class SharedOwner:
    """Holds a number, of which the names in shared memory are `000123_locals` and the like.

    Args:
        number: The number.
        new: Whether to take it if nobody has had it.

    Raises:
        BlockingIOError: A living process holds it.
        OSError: It is another user's, or gone.
    """

    def __init__(self, number: int, new: bool = True) -> None:
        self.number, self.process = number, os.getpid()
        self.path = MEMORY / f"{number:06}_{OWNER}"
        self.file = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if new else 0), 0o600)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_there():
                raise BlockingIOError("somebody has just removed it")
        except OSError:
            os.close(self.file)
            raise

    def _is_there(self) -> bool:
        """Whether the file that was opened is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def note(self) -> None:
        """Note that what stands under the number is of its owner, and of no other program."""
        os.pwrite(self.file, b"1", 0)

    def give_back(self) -> None:
        """Remove what stands under the number, if it is of its owner, and let go of it."""
        if self.process != os.getpid():  # a fork
            return
        if os.fstat(self.file).st_size:
            locks = (Path(gettempdir(), f"{self.number:06}_{name}") for name in _LOCKS)
            for path in (*MEMORY.glob(f"{self.number:06}_*"), *locks):
                if path != self.path:
                    with suppress(OSError):
                        path.unlink()
        with suppress(OSError):
            self.path.unlink()
        os.close(self.file)
        self.process = 0


def remove_left_overs() -> None:
    """Remove what this user's killed runs have left in shared memory, and lock files that no memory belongs to."""
    for number, _ in _mine(MEMORY, OWNER):
        with suppress(OSError):  # in use
            SharedOwner(number, new=False).give_back()
    if MEMORY.is_dir():
        used = {name.partition("_")[0] for name in os.listdir(MEMORY)}
        for number, path in (found for name in _LOCKS for found in _mine(Path(gettempdir()), name)):
            with suppress(OSError):
                if f"{number:06}" not in used and time.time() - path.stat().st_mtime > _OLD:
                    path.unlink()


def _mine(folder: Path, name: str) -> Iterator[tuple[int, Path]]:
    """This user's files of a name under any number."""
    for path in folder.glob(f"[0-9]*_{name}"):
        number = path.name.removesuffix(f"_{name}")
        with suppress(OSError):
            if number.isdecimal() and path.lstat().st_uid == os.geteuid():
                yield int(number), path
