"""An epoch's order: which sample stands in which step, on which rank, read by which worker; each exactly once.

A function of the sets, the seed and the epoch alone says in which order samples are trained. Global batches are cut
from it one after the other, wherever a run goes on; ranks and workers then share each batch. So neither their numbers
nor a resume change a step's samples.

1. Each stream brings its share of the epoch (`stream_shares`, `StreamingDataset.resample_streams`).
2. Streaming's shuffle mixes them inside as many stretches as there are canonical nodes, in runs of neighbouring shards.
3. The stretches give a sample each in turn (`take_turns`): this is the order.
4. From the place of a resume on, it is cut into global batches; ranks share each of them by stretch, so that a node
   reads the shards of few; workers take a rank's batches in turn (`deal`).

The last batch holds what is left. Where the ranks don't divide that, some have a sample less than others, and a
stand-in of weight 0 in its slot. Streaming's own partition repeats samples there, or leaves some out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64
from streaming.base.batching import batching_methods
from streaming.base.shuffle import algos, get_shuffle
from streaming.base.world import World

if TYPE_CHECKING:
    from composer_path.stream.resume import OrderedStreamingDataset

VERSION = 2  # of what is written here; 1 was Streaming's own partition
NOTHING, STAND_IN = -1, -2  # in place of a sample's id: an empty slot, and one that its rank needs something for
_ID_BITS = 40  # of an entry; the rest says which repetition of the sample it is
_ID_MASK = (1 << _ID_BITS) - 1

Ids = Int64[np.ndarray, " samples"]
Entries = Int64[np.ndarray, "*shape"]
Work = Int64[np.ndarray, "nodes ranks workers batches batch_size"]


def check_setting(name: str, value: Any) -> None:
    """Refuse those settings of Streaming's that would repeat samples or leave some out without a word.

    Raises:
        ValueError: This is one; says what it would do.
    """
    if name == "shuffle_algo" and value not in (None, *algos):
        raise ValueError(f"found {value!r}; give one of {', '.join(algos)}")
    if name in REFUSED and value not in (None, REFUSED[name][0]):
        raise ValueError(f"found {value}, which {REFUSED[name][1]}; leave it out")
    if name == "shuffle_block_size" and value is not None and value < 2:
        raise ValueError(f"found {value}, which mixes nothing; give at least 2 samples, or shuffle: false")
    if name == "epoch_size" and value == 0:
        raise ValueError("found 0; leave it out for whole sets, or give a number of samples, as in 50k")


# The value that changes nothing, and what every other one does.
REFUSED: dict[str, tuple[Any, str]] = {
    "batching_method": ("random", "leaves out what doesn't fill a batch of one stream, or of each"),
    "partition_algo": ("relaxed", "belongs to Streaming's partition, which repeats samples or leaves some out"),
    "replication": (1, "gives several ranks the same samples, so that a step has fewer than global_batch_size"),
}
CHECKED = (*REFUSED, "shuffle_algo", "shuffle_block_size", "epoch_size")


def stream_shares(
    sizes: Sequence[int], wanted: Sequence[Mapping[str, Any]], epoch_size: int | None = None
) -> list[int]:
    """How many samples of each stream an epoch holds.

    Args:
        sizes: How many each has.
        wanted: Of each its `repeat` (times its size, rounded down), `choose` (so many) or `proportion` (of the epoch);
            none: all of it.
        epoch_size: Samples of an epoch, shared by `proportion`, or else by size; None for as many as all streams have
            (with proportions) or bring.

    Raises:
        ValueError: A stream brings none, or epoch_size stands beside repeat or choose, which already say it.
    """
    parts = [share.get("proportion") for share in wanted]
    check_shares(wanted, epoch_size)
    if epoch_size is not None or any(part is not None for part in parts):
        weights = [float(part) if part is not None else size for part, size in zip(parts, sizes, strict=True)]
        whole = sum(sizes) if epoch_size is None else epoch_size
        exact = [whole * weight / sum(weights) for weight in weights]
        shares = [math.floor(part) for part in exact]
        nearest = sorted(range(len(exact)), key=lambda at: (shares[at] - exact[at], at))
        for at in nearest[: whole - sum(shares)]:  # those nearest to one more
            shares[at] += 1
    else:
        shares = [_share(size, **share) for size, share in zip(sizes, wanted, strict=True)]
    for at, share in enumerate(shares):
        if share < 1:
            raise ValueError(f"stream {at + 1} of {len(shares)}: none of its {sizes[at]:,} samples is in an epoch")
    return shares


def check_shares(wanted: Sequence[Mapping[str, Any]], epoch_size: int | str | None) -> None:
    """Refuse an `epoch_size` beside streams that already say how many samples they bring."""
    counted = any(share.get("repeat") is not None or share.get("choose") is not None for share in wanted)
    if counted and epoch_size is not None:
        raise ValueError(f"epoch_size: found {epoch_size} beside repeat or choose, which say it too; leave it out")


def _share(size: int, repeat: float | None = None, choose: int | None = None, **_: Any) -> int:
    if choose is not None:
        return int(choose)
    return size if repeat is None else math.floor(repeat * size + 1e-6)  # 0.29 times 100 is 28.999999999999996


def take_turns(num_samples: int, num_stretches: int) -> tuple[Ids, Ids]:
    """Places from 0 up in the order in which they are trained, and the stretch of each.

    Stretches are as Streaming's shuffles cut them (`divide_spans`): their sizes differ by one at most.
    """
    borders = np.arange(num_stretches + 1, dtype=np.int64) * num_samples // num_stretches
    least = num_samples // num_stretches
    longer = np.flatnonzero(np.diff(borders) > least)
    places = (np.arange(least, dtype=np.int64)[:, None] + borders[None, :-1]).ravel()
    stretches = np.tile(np.arange(num_stretches, dtype=np.int64), least)
    return np.concatenate([places, borders[longer] + least]), np.concatenate([stretches, longer])


def deal(ids: Ids, stretches: Ids, global_batch: int, world: World) -> Work:
    """Cut samples in order into global batches, for ranks and workers.

    Args:
        ids: What is still to be trained, in order.
        stretches: Of each.
        global_batch: Samples of a step; the ranks divide it.
        world: Nodes, ranks a node, workers a rank.
    """
    nodes, ranks, workers = world.num_nodes, world.ranks_per_node, world.workers_per_rank
    steps, size = -(-len(ids) // global_batch), global_batch // (nodes * ranks)
    rows = -(-steps // workers) * workers
    table = np.full((rows, global_batch), NOTHING, np.int64)
    whole = len(ids) // global_batch
    batches = ids[: whole * global_batch].reshape(whole, global_batch)
    if nodes * ranks > 1 and whole:  # neighbouring ranks get the samples of the same stretches
        by_stretch = stretches[: whole * global_batch].reshape(whole, global_batch).argsort(axis=1, kind="stable")
        batches = np.take_along_axis(batches, by_stretch, axis=1)
    table[:whole] = batches
    if whole < steps:
        rest = ids[whole * global_batch :]
        rest = rest[stretches[whole * global_batch :].argsort(kind="stable")]
        parts = np.array_split(rest, nodes * ranks)  # the first ones have a sample more
        for part, slots in zip(parts, table[whole].reshape(nodes * ranks, size), strict=True):
            slots[: len(part)] = part
            slots[len(part) : len(parts[0])] = STAND_IN
    work = table.reshape(rows // workers, workers, nodes, ranks, size)
    return np.ascontiguousarray(work.transpose(2, 3, 1, 0, 4))


def numbered(ids: Ids) -> Ids:
    """Entries of an order: above a sample's id stands how often it came before, so that repetitions differ."""
    by_id = ids.argsort(kind="stable")
    ordered = ids[by_id]
    repetitions = np.empty_like(ids)
    repetitions[by_id] = np.arange(len(ids)) - np.searchsorted(ordered, ordered)
    return ids + (repetitions << _ID_BITS)


def sample_of(entries: Entries) -> Entries:
    """The samples' ids alone; what is in place of one stays."""
    return np.where(entries < 0, entries, entries & _ID_MASK)


def repetition_of(entries: Entries) -> Entries:
    """How often the epoch had each sample before."""
    return np.where(entries < 0, 0, entries >> _ID_BITS)


def shuffled(dataset: OrderedStreamingDataset, epoch: int) -> tuple[Ids, Ids]:
    """An epoch's samples in order, and the stretch of each."""
    units, samples = dataset.resample_streams(epoch)
    places, stretches = take_turns(len(samples), dataset.num_canonical_nodes)
    if dataset.shuffle:
        settings = (dataset.num_canonical_nodes, dataset.shuffle_seed, epoch, dataset.block_size)
        shuffle = get_shuffle(dataset.shuffle_algo, units, *settings)
        assert np.array_equal(np.bincount(shuffle, minlength=len(samples)), np.ones(len(samples))), "not a shuffle"
        places = np.asarray(shuffle, np.int64)[places]
    return samples[places], stretches


def generate_work(dataset: OrderedStreamingDataset, world: World, epoch: int, sample_in_epoch: int) -> Work:
    """An epoch's order from a place on, in the shape in which Streaming's workers take it; entries are `numbered`."""
    ids, stretches = shuffled(dataset, epoch)
    todo = slice(sample_in_epoch, dataset.samples_per_epoch)
    return deal(numbered(ids)[todo], stretches[todo], dataset.batch_size * world.num_ranks, world)


# Streaming looks a method up by its name in this table.
METHOD = "every_sample_once"
batching_methods[METHOD] = generate_work  # type: ignore[assignment]
