"""Pieces of shared memory, in which a worker's batches travel one after the other.

Fresh memory costs more than all else that is done with a finished image: the system has to clear each page before it is
written to. So a piece is used again, once nobody can read the batch in it any more:

1. In the worker and where a batch arrives, tensors keep an array alive, by their storage. Views do so, too.
2. The receiver notices the array's end and says so in the piece's first byte. A worker writes into a piece only if it
   says so and the worker's own array has ended.
3. A process that is forked from the receiver could read what the receiver has: pieces in use are retired before that.
4. Nothing has a name in the file system: what is mapped by no process any more is gone, however processes end.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

_HEADER = 64  # bytes: the state, and room so that tensors behind it are aligned
_FREE, _SENT, _RETIRED = range(3)
# Of a worker: whoever keeps more batches than that gets fresh memory, and what was free for so long is given back.
_MAX_PIECES, _MAX_IDLE = 64, 32
_RingName = tuple[int, int]  # the worker's process id, and a number


class _Piece:
    """Shared memory, as this process sees it."""

    def __init__(self, file: int, size: int) -> None:
        self.size, self.memory = size, mmap.mmap(file, size)

    def array(self) -> np.ndarray:
        """An array of its own for each batch: its end is the end of all tensors that are made of it."""
        return np.frombuffer(self.memory, np.uint8, offset=_HEADER)


class _OwnPiece(_Piece):
    """A piece of the process that writes into it."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.sent, self.last_turn = number, False, 0
        self.file: int | None = os.memfd_create("composer_path_batch", os.MFD_CLOEXEC)
        # Memory that runs out is an error here instead of the worker's end by SIGBUS later.
        os.posix_fallocate(self.file, 0, size)
        super().__init__(self.file, size)
        self._lent: Callable[[], np.ndarray | None] = lambda: None

    def lend(self) -> np.ndarray:
        """The array of a new batch."""
        array = self.array()
        self.sent, self._lent = False, weakref.ref(array)
        return array

    def is_free(self) -> bool:
        """Whether nobody can read what was written last."""
        return self.memory[0] == _FREE and self._lent() is None

    def is_given_away(self) -> bool:
        """Whether only the receiver decides on its end."""
        return self.sent and self._lent() is None

    def handle(self) -> Any:
        """What the receiver needs to see it, the first time only."""
        if self.file is None:
            return None
        handle = DupFd(self.file)
        os.close(self.file)
        self.file = None
        return handle

    def __del__(self) -> None:
        """Its file is closed where it was never sent."""
        if getattr(self, "file", None) is not None:
            os.close(self.file)  # type: ignore[arg-type]


class MemoryRing:
    """The pieces of one worker."""

    def __init__(self) -> None:
        self.name: _RingName = os.getpid(), next(_numbers)
        self.pieces: dict[int, _OwnPiece] = {}
        self._turn = 0

    def take(self, size: int) -> Tensor:
        """Memory of at least so many bytes that nobody reads; what it holds is left from another batch.

        Raises:
            OSError: There is too little memory.
        """
        self._turn += 1
        taken: _OwnPiece | None = None
        for piece in list(self.pieces.values()):
            if piece.is_free():
                if taken is None and piece.size >= size + _HEADER:
                    taken = piece
                elif piece.size < size + _HEADER or self._turn - piece.last_turn > _MAX_IDLE:
                    del self.pieces[piece.number]
            elif piece.memory[0] == _RETIRED:
                del self.pieces[piece.number]
        if taken is None:
            taken = self._fresh(size + _HEADER)
        taken.last_turn = self._turn
        return torch.from_numpy(taken.lend())

    def _fresh(self, size: int) -> _OwnPiece:
        if len(self.pieces) >= _MAX_PIECES:
            given_away = next((piece for piece in self.pieces.values() if piece.is_given_away()), None)
            if given_away is not None:  # its memory lives for as long as the receiver's batch
                del self.pieces[given_away.number]
        piece = _OwnPiece(next(_numbers), _rounded(size))
        self.pieces[piece.number] = piece
        return piece

    def piece_at(self, address: int) -> _OwnPiece | None:
        """The piece of a tensor's storage."""
        found = (
            piece for piece in self.pieces.values() if (lent := piece._lent()) is not None and address == _at(lent)
        )
        return next(found, None)


class Sent:
    """A piece on its way: its bytes are shared with the process that takes it from a queue, and copied for a file."""

    def __init__(self, tensor: Tensor, ring: MemoryRing, piece: _OwnPiece) -> None:
        self.tensor, self.ring, self.piece = tensor, ring, piece

    def __reduce__(self) -> tuple[Any, ...]:
        return Tensor.clone, (self.tensor.clone(),)  # torch would move what it shares


def _send(sent: Sent) -> tuple[Any, ...]:
    piece = sent.piece
    if piece.sent:  # to somebody else; only one can say when it has ended
        return sent.__reduce__()
    piece.sent, piece.memory[0] = True, _SENT
    handle = piece.handle()
    return _receive, (sent.ring.name, piece.number, piece.size, handle, list(sent.ring.pieces))


ForkingPickler.register(Sent, _send)

_numbers = itertools.count()
_ring: MemoryRing | None = None
# Of a receiver: pieces by their workers and numbers, and those in which a batch lies.
_received: dict[_RingName, dict[int, _Piece]] = {}
_in_use: dict[int, _Piece] = {}


def own_ring() -> MemoryRing:
    """The ring of this process."""
    global _ring
    if _ring is None or _ring.name[0] != os.getpid():
        _ring = MemoryRing()
    return _ring


def piece_of(tensor: Tensor) -> Sent | None:
    """The piece of this process's ring that a tensor lies in, ready to be sent."""
    piece = None if _ring is None else _ring.piece_at(tensor.untyped_storage().data_ptr())
    if _ring is None or piece is None:
        return None
    return Sent(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()), _ring, piece)


def forget_ended_workers() -> None:
    """Give back the memory of workers that have ended; batches that came from them keep theirs."""
    for name in list(_received):
        try:
            os.kill(name[0], 0)
        except ProcessLookupError:
            _received.pop(name, None)
        except PermissionError:
            pass


def _receive(name: _RingName, number: int, size: int, handle: Any, kept: list[int]) -> Tensor:
    """A batch's memory, where it arrives."""
    if name not in _received:
        forget_ended_workers()
    pieces = _received.setdefault(name, {})
    if handle is not None:
        file = handle.detach()
        try:
            pieces[number] = _Piece(file, size)
        finally:
            os.close(file)
    if number not in pieces:
        raise RuntimeError(
            "a batch must arrive before its worker's memory is given up, found that the worker has ended"
        )
    piece = pieces[number]
    for other in pieces.keys() - set(kept):
        del pieces[other]
    array, use = piece.array(), next(_numbers)
    _in_use[use] = piece
    # At its end a process gives nothing free: daemons may still read.
    weakref.finalize(array, _release, use, os.getpid()).atexit = False
    return torch.from_numpy(array)


def _release(use: int, process: int) -> None:
    if process == os.getpid() and (piece := _in_use.pop(use, None)) is not None:
        piece.memory[0] = _FREE


def _retire() -> None:
    for use in list(_in_use):
        if (piece := _in_use.pop(use, None)) is not None:
            piece.memory[0] = _RETIRED


def _forget() -> None:
    _received.clear()
    _in_use.clear()


os.register_at_fork(before=_retire, after_in_child=_forget)


def _rounded(size: int) -> int:
    """At most a quarter more, so that batches of about the same size fit."""
    step = max(mmap.PAGESIZE, 1 << (size.bit_length() - 3))
    return -(-size // step) * step


def _at(array: np.ndarray) -> int:
    return array.ctypes.data
