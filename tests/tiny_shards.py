"""Small sets of shards for tests of reading, written by Streaming itself, and loaders over them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from streaming import MDSWriter

from composer_path.batches.whole_epoch import WholeEpochLoader
from composer_path.parallel import end_with_parent
from composer_path.storage.places import open_place
from composer_path.stream.guarded import GuardedStreamingDataset

NUM_SAMPLES = 40
BATCH_SIZE = 4
SECONDS = 8.0  # fault_timeout in tests


def write_set(folder: Path, num_samples: int = NUM_SAMPLES, tag: str = "a", **keywords: Any) -> Path:
    """Ten shards of four samples."""
    settings: dict[str, Any] = {"size_limit": 4 * 1100, "hashes": ["xxh64"]} | keywords
    with MDSWriter(out=str(folder), columns={"id": "int", "text": "str"}, **settings) as writer:
        for index in range(num_samples):
            writer.write({"id": index, "text": tag * 1000})
    return folder


def shard_names(folder: Path) -> list[str]:
    """In order."""
    names = sorted(path.name for path in folder.glob("*.mds*"))
    assert len(names) > 5
    return names


def damage(path: Path, kind: str) -> None:
    """Do to a file what the fault's name says."""
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "flipped":
        path.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        raise ValueError(kind)


def build_loader(num_workers: int = 0, batch_size: int = BATCH_SIZE, **keywords: Any) -> WholeEpochLoader:
    """A loader whose batches are the ids of their samples."""
    settings: dict[str, Any] = {"fault_timeout": SECONDS, "num_canonical_nodes": 1, "shuffle": False} | keywords
    dataset = GuardedStreamingDataset(batch_size=batch_size, **settings)
    return WholeEpochLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        worker_init_fn=end_with_parent,
    )


def collate(samples: list[dict[str, Any]]) -> SimpleNamespace:
    """A batch of which only the ids are known: what `WholeEpochLoader` counts."""
    return SimpleNamespace(sample_ids=[sample["id"] for sample in samples], num_samples=len(samples))


def read_epoch(loader: WholeEpochLoader) -> list[int]:
    """All ids of an epoch."""
    return [index for batch in loader for index in batch.sample_ids]


def end_workers(loader: WholeEpochLoader) -> None:
    """Now: the garbage collector would wait five seconds for each, as it takes their queues away first."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


def upload(folder: Path, url: str) -> None:
    """Put a set into a bucket, for servers whose objects aren't files."""
    place = open_place(url)
    for path in sorted(folder.iterdir()):
        place.write(path.name, [path.read_bytes()])
