"""Where a resumed run takes its place in the data, and that it is the same data.

A checkpoint holds `state_dict` of the training set: the epoch and how many of its samples all ranks have had. Composer
gives it back to `load_state_dict`; the next iteration over the set deals out the epoch's order again and starts there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from streaming import StreamingDataset

from composer_path.stream.cache import INDEX
from composer_path.stream.error import StreamError
from composer_path.stream.guarded_stream import GuardedStream


class ResumableStreamingDataset(StreamingDataset):
    """A `StreamingDataset` that knows which data its place belongs to."""

    streams: Sequence[GuardedStream]
    data_hash: str

    def remember_data(self) -> None:
        """Take the sets' indexes as what the data are: other data has another order of samples."""
        indexes = b"".join((stream.folder / INDEX).read_bytes() for stream in self.streams)
        self.data_hash = hashlib.sha256(indexes).hexdigest()[:16]

    def where(self) -> str:
        """The sets, for a message."""
        return ", ".join(stream.where for stream in self.streams)

    def samples_to_come(self) -> int:
        """How many samples the next epoch, or the rest of a resumed one, must at least bring to this rank."""
        _, done = self._resume(self._parallel_rank_world, self.next_epoch)
        return max(0, self.epoch_size - done) // self._parallel_rank_world.num_ranks

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where to go on, and in which data."""
        return super().state_dict(num_samples, from_beginning) | {"data_hash": self.data_hash}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on there, or raise `StreamError` amid an epoch of other data."""
        known = obj.get("data_hash")
        if known is not None and obj["sample_in_epoch"] and known != self.data_hash:
            found = f"sample {obj['sample_in_epoch']:,} of an epoch over other data is where the checkpoint stopped"
            fix = "give it that data again, or start from the weights alone (trainer.load_weights_only)"
            raise StreamError.of("", "data-changed", self.where(), found, fix)
        super().load_state_dict(obj)
