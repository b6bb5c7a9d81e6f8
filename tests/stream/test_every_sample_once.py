"""Claims about the order as loaders read it: each sample once an epoch, in the same steps, by any ranks and workers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from types import SimpleNamespace
from typing import Any

import pytest
from streaming import StreamingDataset
from streaming.base.shuffle import algos
from streaming.base.world import World
from tiny_shards import end_workers, write_set

from composer_path.batches.whole_epoch import WholeEpochLoader
from composer_path.stream.guarded import GuardedStreamingDataset
from composer_path.stream.order import shuffled

SIZES = (1, 2, 3, 5, 11, 16, 24, 41, 66)


class WithStandIn(GuardedStreamingDataset):
    """With something for ranks to read where a step has no sample for them, as the one that is trained on."""

    def stand_in(self) -> dict[str, Any]:
        return {"id": -1}


Sets = dict[tuple[int, bool], WithStandIn]


@dataclass(frozen=True)
class Run:
    """One way to read a set: by so many ranks and workers, with these settings."""

    size: int
    global_batch: int
    ranks: int
    workers: int
    nodes: int | None
    algorithm: str | None
    block: int
    drop_last: bool
    seed: int

    def loader(self, sets: Sets, rank: int, state: dict[str, Any] | None = None) -> WholeEpochLoader:
        """A new run over a set. Ranks stand on nodes of their own, so that one process can read one after the other."""
        dataset = sets[self.size, self.workers > 0]
        dataset._unique_rank_world = dataset._parallel_rank_world = World(self.ranks, 1, 1, rank)
        dataset.batch_size, dataset.drop_last = self.global_batch // self.ranks, self.drop_last
        dataset.num_canonical_nodes = self.nodes
        dataset.shuffle, dataset.shuffle_algo = self.algorithm is not None, self.algorithm or "py1e"
        dataset.shuffle_block_size, dataset.shuffle_seed = self.block, self.seed
        dataset.settle_order()
        # As if it were built: a thousand of them would take more files than a process may have open.
        StreamingDataset.load_state_dict(dataset, {"epoch": -2})
        dataset.next_epoch = 0
        if state is not None:
            dataset.load_state_dict(state)
        return WholeEpochLoader(
            dataset,
            batch_size=self.global_batch // self.ranks,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=collate,
        )

    def read(self, sets: Sets, epochs: int, state: dict[str, Any] | None = None) -> list[list[list[int]]]:
        """Of each epoch the steps, each with all ranks' samples in order of their ids."""
        ranks = []
        for rank in range(self.ranks):
            loader = self.loader(sets, rank, state)
            ranks.append([[batch.sample_ids for batch in loader] for _ in range(epochs)])
            end_workers(loader)
        found = []
        for epoch in range(epochs):
            steps = list(zip_longest(*(rank[epoch] for rank in ranks)))
            assert all(None not in step for step in steps), "a rank has a step less"
            assert all(max(map(len, step)) == min(map(len, step)) for step in steps), "a rank has another size"
            found.append([sorted(index for part in step for index in part if index >= 0) for step in steps])
        return found

    def steps(self, sets: Sets, epoch: int) -> list[list[int]]:
        """What they must be."""
        dataset = self.loader(sets, 0).dataset
        ids = shuffled(dataset, epoch)[0].tolist()
        assert sorted(ids) == list(range(self.size))
        steps = [sorted(ids[at : at + self.global_batch]) for at in range(0, self.size, self.global_batch)]
        return steps[: self.size // self.global_batch] if self.drop_last else steps

    def state(self, sets: Sets, epoch: int, step: int) -> dict[str, Any]:
        """As a checkpoint after a step of an epoch holds it."""
        loader = self.loader(sets, 0)
        loader.dataset.next_epoch = epoch + (step > 0)  # as its workers leave it when they begin
        done = min(step * self.global_batch, loader.dataset.samples_per_epoch)
        return json.loads(json.dumps(loader.dataset.state_dict(done, True)))


def collate(samples: list[dict[str, Any]]) -> SimpleNamespace:
    ids = [sample["id"] for sample in samples]
    return SimpleNamespace(sample_ids=ids, num_samples=sum(index >= 0 for index in ids))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """Sets of all sizes, in shards of three."""
    root = tmp_path_factory.mktemp("sets")
    folders = {size: write_set(root / str(size), size, size_limit=3 * 1100) for size in SIZES}
    # Those that workers read aren't read here before: what is forked may not have threads and locks.
    kinds = product(SIZES, (False, True))
    return {(size, forks): WithStandIn(local=str(folders[size]), batch_size=1) for size, forks in kinds}


def draw_runs(count: int, seed: int, share_with_workers: float) -> Iterator[Run]:
    draw = random.Random(seed)
    for _ in range(count):
        size, ranks = draw.choice(SIZES), draw.choice((1, 1, 2, 3, 4))
        batch = ranks * draw.randint(1, 6)
        yield Run(
            size=size,
            global_batch=batch,
            ranks=ranks,
            workers=draw.randint(1, 3) if draw.random() < share_with_workers else 0,
            nodes=draw.choice((None, 1, draw.randint(1, size), min(8, size))),
            algorithm=draw.choice((None, "py1e", *algos)),
            block=draw.choice((2, 7, 1 << 18)),
            drop_last=batch <= size and draw.random() < 0.2,
            seed=draw.randint(0, 10**6),
        )


def check(run: Run, sets: Sets, draw: random.Random, resumed: bool) -> None:
    """Two epochs, read from the start and, if `resumed`, by others from somewhere, and around the first one's end."""
    expected = [run.steps(sets, epoch) for epoch in range(3)]
    assert run.read(sets, 2) == expected[:2], run
    last = len(expected[0])
    for epoch, step in sorted({(0, draw.randint(0, last)), (0, last), (1, 0)}) if resumed else ():
        state = run.state(sets, epoch, step)
        ranks = draw.choice([ranks for ranks in range(1, 5) if run.global_batch % ranks == 0])
        nodes = draw.choice((None, state["num_canonical_nodes"]))
        other = replace(run, ranks=ranks, workers=draw.choice((0, 0, run.workers)), nodes=nodes)
        assert other.read(sets, 2, state) == [expected[epoch][step:], expected[epoch + 1]], (run, step, other)


def test_each_sample_is_read_once_by_any_ranks_and_workers_from_any_place(sets: Sets) -> None:
    draw = random.Random(1)
    for number, run in enumerate(draw_runs(60, 7, 0.1)):
        check(run, sets, draw, resumed=number % 3 == 0)


@pytest.mark.slow
def test_each_sample_is_read_once_in_six_hundred_combinations(sets: Sets) -> None:
    draw = random.Random(2)
    for number, run in enumerate(draw_runs(600, 11, 0.15)):
        check(run, sets, draw, resumed=number % 5 == 0)
