"""The failure table's rows, and what each must come to; `composer -n 2 fault_rows.py PLAN.json` goes through them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import xxhash
from streaming.base.constant import LOCALS
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _get_path, _pack_locals
from tiny_shards import NUM_SAMPLES, build_loader, damage, end_workers, read_epoch, write_set

from composer_path.stream.cache import take_cache
from composer_path.stream.error import StreamError

BAD = "shard.00005.mds"


@dataclass
class Row:
    """A fault.

    Args:
        rule: Of the error that it ends in; "" if it costs nothing.
        prepare: Makes it, given the remote's folder and the cache; returns what must be kept while it is read.
        spoil: What the proxy does instead, and how often.
        num_samples: Of an epoch, if it ends well.
        keywords: Of the loader.
        own_folder: Without a remote.
        short_of_space: While it is read.
    """

    rule: str
    prepare: Callable[[Path, Path], Any] = lambda remote, cache: None
    spoil: tuple[str, str, int] | None = None
    num_samples: int = NUM_SAMPLES
    keywords: tuple[tuple[str, Any], ...] = ()
    own_folder: bool = False
    short_of_space: bool = False


def damaged(kind: str, name: str = BAD) -> Callable[[Path, Path], None]:
    return lambda remote, cache: damage(remote / name, kind)


def damaged_cache(kind: str) -> Callable[[Path, Path], None]:
    def prepare(remote: Path, cache: Path) -> None:
        shutil.copytree(remote, cache)
        damage(cache / BAD, kind)

    return prepare


def converted_again(remote: Path, cache: Path) -> None:
    shutil.copytree(remote, cache)
    shutil.rmtree(remote)
    write_set(remote, num_samples=24, tag="b")


def garbage(remote: Path, cache: Path) -> None:
    """Contents that aren't samples, under the right checksum."""
    size = (remote / BAD).stat().st_size
    (remote / BAD).write_bytes(b"\xff" * size)
    index = json.loads((remote / "index.json").read_text())
    for shard in index["shards"]:
        if shard["raw_data"]["basename"] == BAD:
            shard["raw_data"]["hashes"]["xxh64"] = xxhash.xxh64(b"\xff" * size).hexdigest()
    (remote / "index.json").write_text(json.dumps(index))


def broken_index(remote: Path, cache: Path) -> None:
    (remote / "index.json").write_text('{"version": 2, "shards": [')


def file_in_the_way(remote: Path, cache: Path) -> None:
    cache.write_text("no folder")


def left_over(remote: Path, cache: Path) -> SharedMemory:
    """As of a killed run: a file that wasn't finished, and shared memory that claims the folder."""
    cache.mkdir()
    (cache / f"{BAD}.123-0123abcd.part").write_bytes(b"left over")
    for number in range(990_000, 999_000):
        data = _pack_locals([str(cache)], number)
        with contextlib.suppress(FileExistsError):
            memory = SharedMemory(_get_path(number, LOCALS), True, len(data), auto_cleanup=False)
            memory.buf[: len(data)] = data
            return memory
    raise AssertionError("no number is free")


ROWS = {
    "missing shard": Row("missing", damaged("missing")),
    "truncated shard": Row("size", damaged("truncated")),
    "changed shard": Row("hash", damaged("flipped")),
    "missing shard, own folder": Row("missing", damaged("missing"), own_folder=True),
    "truncated shard, own folder": Row("size", damaged("truncated"), own_folder=True),
    "changed shard, own folder": Row("hash", damaged("flipped"), own_folder=True),
    "missing index": Row("missing", damaged("missing", "index.json")),
    "broken index": Row("index", broken_index),
    "sample that can't be decoded": Row("unreadable", garbage),
    "checksum that the index lacks": Row("no-such-hash", keywords=(("validate_hash", "sha256"),)),
    "cached shard changed": Row("", damaged_cache("flipped")),
    "cached shard truncated": Row("", damaged_cache("truncated")),
    "converted again, old cache": Row("", converted_again, num_samples=24),
    "cache not writable": Row("cache-not-writable", file_in_the_way),
    "disk full": Row("cache-full", short_of_space=True),
    "cache of another run": Row("cache-in-use", lambda remote, cache: take_cache(cache)),
    "left over from a killed run": Row("", left_over),
    "403": Row("forbidden", spoil=(BAD, "status:403", -1)),
    "404": Row("missing", spoil=(BAD, "status:404", -1)),
    "400": Row("refused", spoil=(BAD, "status:400", -1)),
    "403 on the index": Row("forbidden", spoil=("index.json", "status:403", -1)),
    "503 twice": Row("", spoil=(BAD, "status:503", 2)),
    "reset twice": Row("", spoil=(BAD, "reset", 2)),
    "cut twice": Row("", spoil=(BAD, "cut:1500", 2)),
    "a byte changed on its way once": Row("", spoil=(BAD, "flip:2000", 1)),
    "slow link": Row("", spoil=(BAD, "slow:4000", -1)),
    "endless 503": Row("unreachable", spoil=(BAD, "status:503", -1)),
    "endless resets": Row("unreachable", spoil=(BAD, "reset", -1)),
    "nothing but cut bodies": Row("cut", spoil=(BAD, "cut:0", -1)),
    "always a changed byte": Row("hash", spoil=(BAD, "flip:2000", -1)),
    "black hole": Row("unreachable", spoil=(BAD, "hang", -1)),
    "too slow": Row("too-slow", spoil=(BAD, "slow:300", -1)),
}


def place_of(name: str) -> str:
    """A row's folder, in the bucket too."""
    return "row-" + "".join(letter if letter.isalnum() else "-" for letter in name)


def make_sets(folder: Path) -> None:
    """Each row's own set."""
    for name in ROWS:
        write_set(folder / place_of(name))


@contextmanager
def file_size_limit(wanted: bool) -> Iterator[None]:
    """No file above 4 KiB, as on a full disk: an index fits, a shard doesn't."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if wanted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def outcome(name: str, remotes: Path, cache: Path, num_workers: int) -> tuple[str, str, int]:
    """Make a row's fault and read an epoch: the error's rule and its text, and how many samples came."""
    row = ROWS[name]
    leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
    folder = remotes / place_of(name)
    kept = row.prepare(folder, cache) if leads else None
    _wait_for_all()
    remote = f"s3://bucket/{place_of(name)}" if row.spoil else str(folder)
    place = {"local": str(folder)} if row.own_folder else {"remote": remote, "local": str(cache)}
    loader, error, seen = None, None, 0
    with file_size_limit(row.short_of_space):
        try:
            loader = build_loader(num_workers, download_timeout=2.0, **place, **dict(row.keywords))
            seen = len(read_epoch(loader))
        except StreamError as failure:
            error = failure
        _wait_for_all()
        try:
            if loader is not None:
                loader.dataset.raise_failure()  # another rank's, if this one was through before
        except StreamError as failure:
            error = error or failure
        if loader is not None:
            end_workers(loader)
    if hasattr(kept, "close"):
        kept.close()
    elif kept is not None:
        kept.cleanup()
    return (error.rule or str(error) if error else "", str(error or ""), seen)


def _wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    torch.distributed.init_process_group("gloo")
    found = {}
    for the_name in ROWS:
        the_cache = Path(plan["caches"]) / place_of(the_name)
        found[the_name] = outcome(the_name, Path(plan["remotes"]), the_cache, plan["num_workers"])
    rank = torch.distributed.get_rank()
    with tempfile.NamedTemporaryFile("w", dir=plan["out"], delete=False) as file:
        json.dump(found, file)
    os.replace(file.name, Path(plan["out"]) / f"rank{rank}.json")
