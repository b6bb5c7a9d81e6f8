"""The one error that ends a run whose data can't be read, and how all of its processes learn of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from streaming.base.shared import SharedArray
from torch import distributed

from composer_path.storage.errors import masked, without_password

_NOTE_BYTES = 4096

Value = TypeVar("Value")


class StreamError(RuntimeError):
    """Data that can't be read: which shard, which rule, where, and what to do. Never holds credentials or text.

    Attributes:
        shard: The file's name in its index, or `index.json`, or "" where no file is meant.
        rule: A short slug: missing, forbidden, unreachable, size, hash, ...
        where: The set's place, or the cache folder.
        fix: What to do.
    """

    # A loader's worker hands its error on by the message alone, which is all of it as one line.

    def __init__(self, message: str, shard: str = "", rule: str = "", where: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.shard, self.rule, self.where, self.fix = shard, rule, where, fix

    @classmethod
    def of(cls, shard: str, rule: str, where: str, found: str, fix: str) -> StreamError:
        """The error with its usual wording."""
        where = without_password(where)
        file = "" if not shard else f"{shard} of " if shard == "index.json" else f"shard {shard} of "
        return cls(f"{file}{where}: {rule}: {masked(found)}; {fix}", shard, rule, where, fix)


class FailureNote:
    """The first failure of any process that reads this data set on this machine, in shared memory of this name.

    A worker that failed would else leave the others waiting for its shard.
    """

    def __init__(self, name: str) -> None:
        self._bytes = SharedArray(_NOTE_BYTES, np.uint8, name)

    def clear(self) -> None:
        """Forget it: a killed run may have left one."""
        self._bytes[:] = 0

    def write(self, error: StreamError) -> None:
        """Note a failure, unless there is one."""
        if not self.is_set():
            texts, letters = (str(error), error.shard, error.rule, error.where, error.fix), _NOTE_BYTES
            while len(data := json.dumps([text[:letters] for text in texts]).encode()) > _NOTE_BYTES:
                letters //= 2
            values = np.frombuffer(data, np.uint8)
            self._bytes[1 : len(values)] = values[1:]
            self._bytes[0] = values[0]  # last: a reader looks here first

    def is_set(self) -> bool:
        """Whether there is a failure."""
        return bool(self._bytes[0])

    def read(self) -> StreamError | None:
        """The failure, if there is one."""
        return StreamError(*json.loads(self._bytes.numpy().tobytes().rstrip(b"\0"))) if self.is_set() else None


def of_all_ranks(value: Value) -> list[Value]:
    """What each rank has, in their order."""
    values = [value]
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        values *= distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return values


def agree_on_failure(step: Callable[[], None]) -> None:
    """Do something on this rank, then raise on all ranks what any of them met: none waits for one that is gone."""
    failure: StreamError | None = None
    try:
        step()
    except StreamError as error:
        failure = error
    for met in (failure, *of_all_ranks(failure)):
        if met is not None:
            raise met
