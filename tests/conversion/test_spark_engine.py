"""Spark converts partitions to the same bytes; in its local mode with four tasks at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from composer_path.conversion.convert import convert
from composer_path.conversion.rejected_file import ConvertError

pytestmark = pytest.mark.slow  # 25 s for Java and four Python processes


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("pyspark", reason="pip install 'composer_path[spark]'")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    records: list[dict[str, Any]] = [{"id": i, "patient": f"P{i // 2}", "conversations": turns} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "imgs").mkdir()
    return tmp_path / "data.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_spark_writes_the_same_bytes_and_tells_what_is_wrong(data: Path, tmp_path: Path) -> None:
    images = tmp_path / "imgs"
    convert(data, images, tmp_path / "one", partition_size=3)
    convert(data, images, tmp_path / "out", partition_size=3, engine="spark", master="local[4]")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "one")) == 14 * 2 + 2
    records = json.loads(data.read_text())
    data.write_text(json.dumps([*records, records[0]]))
    with pytest.raises(ConvertError, match=r"record 40: id: .*found the id of record 0;"):
        convert(data, images, tmp_path / "bad", partition_size=3, engine="spark", master="local[4]")
    assert not (tmp_path / "bad").exists()


def test_a_master_that_is_not_there_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="--engine spark: Spark must start, found"):
        convert(data, tmp_path / "imgs", tmp_path / "out", engine="spark", master="nonsense")
