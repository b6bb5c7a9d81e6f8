"""The one error that ends a run whose data can't be read, and how all processes of a machine learn of it."""

from __future__ import annotations

import json

import numpy as np
from streaming.base.shared import SharedArray

from composer_path.storage.errors import masked, without_password

_NOTE_BYTES = 1 << 14  # of which an escaped letter may take six


class StreamError(RuntimeError):
    """Data that can't be read: which shard, which rule, where, and what to do. Never holds credentials or text.

    Args:
        message: All of it as one line. (A loader's worker hands its error on by this text alone.)
        shard: The file's name in its index, or `index.json`, or "" where no file is meant.
        rule: A short slug: missing, forbidden, unreachable, size, hash, ...
        where: The set's place, or the cache folder.
        fix: What to do.
    """

    def __init__(self, message: str, *, shard: str = "", rule: str = "", where: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.shard, self.rule, self.where, self.fix = shard, rule, where, fix

    @classmethod
    def of(cls, shard: str, rule: str, where: str, found: str, fix: str) -> StreamError:
        """The error with its usual wording."""
        what = f"shard {shard} of " if shard and shard != "index.json" else f"{shard} of " if shard else ""
        where, found = without_password(where), masked(found)
        return cls(f"{what}{where}: {rule}: {found}; {fix}", shard=shard, rule=rule, where=where, fix=fix)

    def to_json(self) -> str:
        """For other processes."""
        fields = {key: getattr(self, key) for key in ("shard", "rule", "where", "fix")}
        return json.dumps({"message": str(self), **fields})

    @classmethod
    def from_json(cls, text: str) -> StreamError:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


class FailureNote:
    """The first failure of any process that reads this data set on this machine, in shared memory.

    A worker that failed would else leave the others waiting for its shard.

    Args:
        name: Of the shared memory; the same for all these processes.
    """

    def __init__(self, name: str) -> None:
        self._bytes = SharedArray(_NOTE_BYTES, np.uint8, name)

    def clear(self) -> None:
        """Forget it: a killed run may have left one."""
        self._bytes[:] = 0

    def write(self, error: StreamError) -> None:
        """Note a failure, unless there is one."""
        if self.read() is not None:
            return
        short = StreamError(str(error)[:1500], shard=error.shard[:200], rule=error.rule, where=error.where[:300])
        short.fix = error.fix[:300]
        values = np.frombuffer(short.to_json().encode(), np.uint8)
        self._bytes[1 : len(values)] = values[1:]
        self._bytes[0] = values[0]  # last: a reader looks here first

    def is_set(self) -> bool:
        """Whether there is a failure."""
        return bool(self._bytes[0])

    def read(self) -> StreamError | None:
        """The failure, if there is one."""
        values = self._bytes.numpy()
        if not values[0]:
            return None
        return StreamError.from_json(values.tobytes().rstrip(b"\0").decode())
