"""A note that every rank sees: which of them failed first, and with which exit code."""

from __future__ import annotations

import datetime
import os
import time
from contextlib import suppress
from typing import Any

from composer.utils import dist
from torch.distributed import TCPStore

from composer_path.guards.ending import Voice

_PATIENCE = datetime.timedelta(seconds=60)
_HEARD_WITHIN = 3.0  # seconds in which rank 0 says a rank's words, else it says them itself


class FailureBoard:
    """A small store on rank 0, beside torch's own, which other threads may ask at any time."""

    def __init__(self) -> None:
        self.store: Any = None  # a `TCPStore`, whose stubs lack what it can
        self.code: int | None = None  # of the rank that failed first

    def join(self) -> None:
        """Open it; every rank must call this."""
        if dist.get_world_size() == 1:
            return
        place: list[tuple[str, int] | None] = [None]
        if dist.get_global_rank() == 0:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            self.store = TCPStore(host, 0, is_master=True, timeout=_PATIENCE, wait_for_workers=False)
            place = [(host, self.store.port)]
        dist.broadcast_object_list(place, src=0)
        if self.store is None and place[0] is not None:
            self.store = TCPStore(*place[0], is_master=False, timeout=_PATIENCE, wait_for_workers=False)
        Voice.tell = self.tell

    def leave(self) -> None:
        """Ask it no more."""
        self.store = Voice.tell = None

    def tell(self, code: int, words: str) -> tuple[int, bool]:
        """Note a failure, unless there is one; gives the first one's code, and whether this rank must say its words."""
        rank = dist.get_global_rank()
        if self.code is not None or self.store is None:
            return (code, rank == 0) if self.code is None else (self.code, False)
        try:
            if self.store.add("failures", 1) > 1:
                self.code = int(self.store.get("code"))
                return self.code, False
            self.store.set("words", words)
            self.store.set("rank", str(rank))
            self.store.set("code", str(code))
            self.code, until = code, time.monotonic() + _HEARD_WITHIN
            while rank and time.monotonic() < until:
                if self.store.check(["heard"]):
                    return code, False
                time.sleep(0.1)
        except RuntimeError:  # rank 0 is gone
            return code, rank == 0
        return code, True

    def failed(self) -> int | None:
        """The exit code of the rank that failed first; None while all is well. Rank 0 says what another rank told."""
        store = self.store
        with suppress(RuntimeError):
            if self.code is None and store is not None and store.check(["code"]):
                self.code, rank = int(store.get("code")), store.get("rank").decode()
                if dist.get_global_rank() == 0 and rank != "0":
                    os.write(2, f"rank {rank}: {store.get('words').decode()}\n".encode())
                    store.set("heard", "yes")
        return self.code
