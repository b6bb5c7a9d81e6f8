"""How soon the first batch comes from a bucket, and how much training waits then: by shard size and order.

A real S3 server (rclone) stands behind a proxy that delays each request and shares one link's bandwidth among all
connections. Nothing is decoded and a step is a sleep, so that the link is measured and not the processor.

    PYTHONPATH=tests python -m benchmarks.first_batch
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3_server import KEY, SECRET, Proxy, serve_s3
from tiny_shards import end_workers

from benchmarks.measure import machine
from benchmarks.tissue_images import write_tissue_images
from composer_path.batches.whole_epoch import WholeEpochLoader
from composer_path.conversion.convert import convert
from composer_path.parallel import end_with_parent
from composer_path.stream.guarded import GuardedStreamingDataset

NUM_IMAGES, NUM_RECORDS = 300, 2000
LATENCY, MEGABITS = 0.030, 200  # s a request; of the whole link
BATCH, STEP, NUM_STEPS, NUM_WORKERS = 16, 0.4, 25, 2  # samples, s, batches, processes
SIZES = ("8mb", "16mb", "64mb")
BLOCKS = (250, 1000, None)  # samples; None: Streaming's default, here the whole set
PREDOWNLOADS = (BATCH, 8 * BATCH, 32 * BATCH)  # samples a worker; the second is Streaming's default


@dataclass
class Link(Proxy):
    """A long thin line: each request waits, all answers share the bandwidth."""

    latency: float = LATENCY
    bytes_per_second: float = MEGABITS * 1e6 / 8
    passed: int = 0
    _free_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _pass_on(self, client: socket.socket, head: bytes, how: str) -> None:
        time.sleep(self.latency)
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        lines.insert(1, b"Connection: close")
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            server.sendall(b"\r\n".join(lines))
            while data := server.recv(65536):
                self._wait(len(data))
                client.sendall(data)

    def _wait(self, num_bytes: int) -> None:
        with self._lock:
            self.passed += num_bytes
            self._free_at = max(self._free_at, time.monotonic()) + num_bytes / self.bytes_per_second
            wait = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait))


def make_sets(folder: Path) -> dict[str, int]:
    """The same records in shards of each size; how many shards each has."""
    images = write_tissue_images(folder / "images", NUM_IMAGES)
    turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "Tissue."}]
    records = [{"id": i, "image": images[i % NUM_IMAGES].name, "conversations": turns} for i in range(NUM_RECORDS)]
    (folder / "data.json").write_text(json.dumps(records))
    shards = {}
    for size in SIZES:
        out = folder / "s3" / "bucket" / size
        convert(
            folder / "data.json", folder / "images", out, size_limit=size, check="header", workers=2, key=folder / "key"
        )
        shards[size] = len(json.loads((out / "index.json").read_text())["shards"])
    return shards


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What the loader counts, and the bytes that arrived."""
    return {"num_images": [1] * len(samples), "bytes": sum(len(sample["images"]) for sample in samples)}


def measure(link: Link, size: str, cache: Path, **settings: Any) -> dict[str, Any]:
    """Read `NUM_STEPS` batches with a step after each."""
    link.passed = 0
    start = time.monotonic()
    dataset = GuardedStreamingDataset(
        remote=f"s3://bucket/{size}", local=str(cache), batch_size=BATCH, num_canonical_nodes=1, **settings
    )
    loader = WholeEpochLoader(
        dataset,
        batch_size=BATCH,
        num_workers=NUM_WORKERS,
        collate_fn=collate,
        worker_init_fn=end_with_parent,
        persistent_workers=True,
    )
    batches, waits, first_bytes = iter(loader), [], 0
    for step in range(NUM_STEPS):
        asked = time.monotonic()
        next(batches)
        waits.append(time.monotonic() - asked)
        first_bytes = first_bytes or link.passed
        if step == 0:
            first = time.monotonic() - start
        time.sleep(STEP)
    end_workers(loader)
    shutil.rmtree(cache)
    stalled = sum(waits[1:])
    return {
        "first_batch_s": round(first, 2),
        "megabytes_before_it": round(first_bytes / 1e6, 1),
        "stall_share_after": round(stalled / (stalled + STEP * (NUM_STEPS - 1)), 3),
        "longest_stall_s": round(max(waits[1:]), 2),
    }


def main() -> None:
    """Measure the grid and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "first_batch.json")
    parser.add_argument("--folder", type=Path, help="for sets and caches, 2.5 GB (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        shards = make_sets(folder)
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(keys | {"AWS_EC2_METADATA_DISABLED": "true"})
        rows = []
        with serve_s3(folder / "s3") as port:
            link = Link(port)
            link.start()
            os.environ["S3_ENDPOINT_URL"] = f"http://127.0.0.1:{link.port}"
            plans: list[dict[str, Any]] = [{"shuffle": False, "predownload": 8 * BATCH}]
            plans += [
                {"shuffle": True, "shuffle_block_size": block, "predownload": number}
                for block, number in itertools.product(BLOCKS, PREDOWNLOADS)
            ]
            for plan, size in itertools.product(plans, SIZES):
                found = measure(link, size, folder / "cache", **plan)
                load = round(os.getloadavg()[0], 1)
                rows.append({"shard_size": size} | plan | found | {"load_average": load})
                print(rows[-1], flush=True)
    result = {
        "machine": machine(),
        "link": {"latency_s": LATENCY, "megabits_per_second": MEGABITS, "shared_by_all_connections": True},
        "set": {"records": NUM_RECORDS, "shards": shards},
        "loader": {"batch_size": BATCH, "step_s": STEP, "steps": NUM_STEPS, "workers": NUM_WORKERS},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
