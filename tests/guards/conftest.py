"""The shards that all runs here read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import convert_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")
