"""Sets that the tests of looking into shards share; what they read gives Streaming's shared memory back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from streaming_memory import _close_shared_memory  # noqa: F401 (a fixture)
from tiny_sets import (
    columns_of,
    records,
    write_set,
)


@pytest.fixture(scope="session")
def samples() -> list[dict[str, Any]]:
    return [columns_of(record) for record in records()]


@pytest.fixture(scope="session")
def flat(samples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_set(tmp_path_factory.mktemp("sets") / "flat", samples)
    assert len(list(folder.glob("*.mds"))) >= 3
    return folder


@pytest.fixture(scope="session")
def partitioned(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards in two parts."""
    folder = tmp_path_factory.mktemp("sets") / "partitioned"
    index = json.loads((flat / "index.json").read_text())
    for number, shard in enumerate(index["shards"]):
        part = folder / f"part-{number // 2:05}"
        part.mkdir(parents=True, exist_ok=True)
        (part / "done.json").write_text('{"files": []}')
        name = f"{part.name}/shard.{number % 2:05}.mds"
        shutil.copy(flat / shard["raw_data"]["basename"], folder / name)
        shard["raw_data"]["basename"] = name
    (folder / "index.json").write_text(json.dumps(index))
    shutil.copy(flat / "dataset.json", folder)
    return folder


@pytest.fixture(scope="session")
def compressed(samples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "compressed", samples, compression="zstd")


@pytest.fixture
def bucket(partitioned: Path) -> Iterator[str]:
    """The same set in fsspec's store in memory; the tests of conversion and of streaming have real servers."""
    store = fsspec.filesystem("memory")
    store.put(f"{partitioned}/", "/bucket/set/", recursive=True)
    yield "memory://bucket/set"
    store.rm("/bucket", recursive=True)


@pytest.fixture(params=["flat", "partitioned", "compressed", "bucket"])
def any_set(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))
