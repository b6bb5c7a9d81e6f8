"""Which order an epoch has, where a resumed run takes its place in it, and that it is the same data and order.

A checkpoint holds `state_dict` of the training set: the epoch, how many of its samples all ranks have had, and what the
order depends on. Composer gives it back to `load_state_dict`; the next iteration over the set deals out the epoch's
order again and starts there. Amid an epoch nothing may change that the order depends on; the next one may have another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from streaming import StreamingDataset
from streaming.base.constant import RESUME
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _get_path
from streaming.base.util import number_abbrev_to_int
from streaming.base.world import World

from composer_path.stream.cache import INDEX
from composer_path.stream.error import StreamError
from composer_path.stream.guarded_stream import GuardedStream
from composer_path.stream.order import METHOD, VERSION, stream_shares

log = logging.getLogger(__name__)

_OF_STREAMING = ("epoch", "sample_in_epoch", "num_canonical_nodes", "shuffle_seed", "initial_physical_nodes")


class OrderedStreamingDataset(StreamingDataset):
    """A `StreamingDataset` whose epochs have each sample once; it knows which data and order its place belongs to.

    Attributes:
        shares: How many samples of each stream an epoch has.
        samples_per_epoch: How many are trained, which `drop_last` makes fewer.
        block_size: Within how many samples the shuffle moves one.
    """

    streams: Sequence[GuardedStream]
    data_hash: str
    drop_last: bool
    asked_epoch_size: int | str | None
    batch_size: int
    num_canonical_nodes: int
    shares: list[int]
    samples_per_epoch: int

    def settle_order(self) -> None:
        """Fix what the order depends on, where the settings leave it open; to be called once.

        Raises:
            ValueError: There can't be such an order, or an epoch has no step.
        """
        self.batching_method = METHOD
        self._asked_canonical_nodes: int | None = self.num_canonical_nodes
        self._asked_block_size: int | None = self.shuffle_block_size
        epoch_size = None if self.asked_epoch_size is None else number_abbrev_to_int(self.asked_epoch_size)
        sizes = self.samples_per_stream.tolist()
        self.shares = stream_shares(sizes, [stream.share for stream in self.streams], epoch_size)
        for stream, share in zip(self.streams, self.shares, strict=True):
            stream.choose = share
        self.epoch_size = sum(self.shares)
        world = self._parallel_rank_world
        global_batch = (self.batch_size or 1) * world.num_ranks
        self.samples_per_epoch = self.epoch_size - (self.epoch_size % global_batch if self.drop_last else 0)
        if not self.samples_per_epoch:
            found = f"found a global batch of {global_batch:,}, and an epoch has {self.epoch_size:,} samples"
            raise ValueError(f"drop_last: {found}: it would have no step; lower global_batch_size, or drop_last: false")
        self.length = math.ceil(self.samples_per_epoch / world.num_ranks)
        most, nodes = self.epoch_size, self._asked_canonical_nodes
        if nodes is not None and not 1 <= nodes <= most:
            fits = f"give 1 to {most:,}, or leave it out ({min(world.num_nodes, most)} here)"
            raise ValueError(f"num_canonical_nodes: found {nodes:,}, and an epoch has {most:,} samples; {fits}")
        self.num_canonical_nodes = nodes or min(world.num_nodes, most)

    @property
    def block_size(self) -> int:
        """As Streaming has it by default."""
        return self._asked_block_size or max(4_000_000 // self.num_canonical_nodes, 1 << 18)

    def describe_epoch(self) -> str:
        """What an epoch holds, in a line."""
        parts = []
        for stream, size, share in zip(self.streams, self.samples_per_stream.tolist(), self.shares, strict=True):
            times, rest = divmod(share, size)
            some = f"{rest:,} of its {size:,} samples" + (" once more" if times else "")
            whole = f"each of its {size:,} samples " + ("once" if times == 1 else f"{times} times")
            words = " and ".join(([whole] if times else []) + ([some] if rest else []))
            parts.append(f"{stream.name or stream.where}: {words}")
        left_out = self.epoch_size - self.samples_per_epoch
        end = f"; {left_out:,} of them are left out (drop_last)" if left_out else ""
        global_batch = (self.batch_size or 1) * self._parallel_rank_world.num_ranks
        steps = f"{-(-self.samples_per_epoch // global_batch):,} steps"
        return f"an epoch has {self.epoch_size:,} samples in {steps} ({'; '.join(parts)}){end}"

    def remember_data(self) -> None:
        """Take the sets' indexes as what the data are: other data has another order of samples."""
        indexes = b"".join((stream.folder / INDEX).read_bytes() for stream in self.streams)
        self.data_hash = hashlib.sha256(indexes).hexdigest()[:16]

    def where(self) -> str:
        """The sets, for a message."""
        return ", ".join(stream.where for stream in self.streams)

    def to_come(self) -> tuple[int, int]:
        """How many steps, and samples of this rank, the next epoch has, or the rest of a resumed one."""
        world = self._parallel_rank_world
        _, done = self._resume(world, self.next_epoch)
        global_batch = self.batch_size * world.num_ranks
        whole, rest = divmod(max(0, self.samples_per_epoch - done), global_batch)
        share, more = divmod(rest, world.num_ranks)
        return whole + (rest > 0), whole * self.batch_size + share + (world.rank < more)

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        """The epoch to come, and how many of its samples are done; as Streaming's, which leaves a file open each time.

        Args:
            world: Unused.
            epoch: What it is if no state was loaded, or an earlier epoch's.
        """
        name = _get_path(self._shm_prefix_int, RESUME)
        try:
            memory = SharedMemory(name, create=False, auto_cleanup=False)
        except FileNotFoundError:
            return epoch, 0
        state = json.loads(bytes(memory.buf).partition(b"\0")[0])
        if state["epoch"] < epoch:
            return epoch, 0
        # As `load_state_dict` settled them; it may have been called when this worker was there already.
        self.num_canonical_nodes, self.shuffle_seed = state["num_canonical_nodes"], state["shuffle_seed"]
        return state["epoch"], state["sample_in_epoch"]

    def order_words(self, num_canonical_nodes: int, shuffle_seed: int) -> dict[str, str]:
        """What the order of an epoch's samples depends on, beside the data."""
        parts = any(share % size for share, size in zip(self.shares, self.samples_per_stream.tolist(), strict=True))
        shares = ",".join(map(str, self.shares))
        return {
            "version": str(VERSION),
            "samples": shares if len(shares) < 100 else hashlib.sha256(shares.encode()).hexdigest()[:16],
            "sampling": f"{self.sampling_method}/{self.sampling_granularity}" if parts else "whole",
            "shuffle": f"{self.shuffle_algo}/{self._asked_block_size or 'auto'}" if self.shuffle else "none",
            "shuffle_seed": str(shuffle_seed) if self.shuffle or parts else "any",
            "num_canonical_nodes": str(num_canonical_nodes),
        }

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where to go on, and in which data and order.

        At an epoch's end Composer asks for 0 samples while Streaming still stores the finished epoch, whose order the
        next one would then repeat; the state then names the next epoch. (A state that was loaded but not used yet
        names the epoch to come itself.)
        """
        state = super().state_dict(num_samples, from_beginning)
        if num_samples == 0 and from_beginning:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        words = self.order_words(state["num_canonical_nodes"], state["shuffle_seed"])
        order = " ".join(f"{key}={value}" for key, value in words.items())
        return state | {"samples_per_epoch": self.samples_per_epoch, "data_hash": self.data_hash, "order": order}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on there.

        `num_canonical_nodes`, if it was left out, stays as the run began.

        Raises:
            StreamError: Amid an epoch of other data, or of another order.
        """
        done = obj["sample_in_epoch"]
        over = done >= (obj.get("samples_per_epoch") or self.samples_per_epoch)  # an epoch's last step
        amid = done > 0 and not over
        known = obj.get("data_hash")
        if known is not None and amid and known != self.data_hash:
            found = f"sample {done:,} of an epoch over other data is where the checkpoint stopped"
            fix = "give it that data again, or start from the weights alone (trainer.load_weights_only)"
            raise StreamError.of("", "data-changed", self.where(), found, fix)
        nodes = self._asked_canonical_nodes or min(obj["num_canonical_nodes"] or 1, self.epoch_size)
        self._compare_order(obj, self.order_words(nodes, self.shuffle_seed), amid)
        self.num_canonical_nodes = nodes
        place = {"sample_in_epoch": self.samples_per_epoch if over else done}
        place |= {"num_canonical_nodes": nodes, "shuffle_seed": self.shuffle_seed}
        self.next_epoch = obj["epoch"]  # also where a later one was begun in this process
        super().load_state_dict({key: obj.get(key) for key in _OF_STREAMING} | place)

    def _compare_order(self, obj: Mapping[str, Any], words: Mapping[str, str], amid: bool) -> None:
        """Refuse another order amid an epoch, and tell of one from the next epoch on."""
        began = dict(word.split("=", 1) for word in (obj.get("order") or "").split())
        if not began:  # an earlier version's run
            began = {"version": "1", **{key: str(obj[key]) for key in ("shuffle_seed", "num_canonical_nodes")}}
        changed = [
            f"{key} {began[key]}, now {value}"
            for key, value in words.items()
            if key in began and began[key] != value and "any" not in (value, began[key])
        ]
        if changed and amid:
            found = f"sample {obj['sample_in_epoch']:,} of an epoch in another order is where the checkpoint stopped"
            fix = "give those settings again, take a checkpoint of an epoch's end, or start from the weights alone"
            if began["version"] != str(VERSION):
                fix = "end that epoch with the version that began it, or start from the weights alone"
            found += f" ({'; '.join(changed)})"
            raise StreamError.of("", "order-changed", self.where(), found, f"{fix} (trainer.load_weights_only)")
        if changed and os.environ.get("RANK", "0") == "0":
            log.info("from the next epoch on samples come in another order: %s", "; ".join(changed))
