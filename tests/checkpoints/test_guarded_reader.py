"""What torch.distributed.checkpoint writes comes back through the gate as it was."""

from __future__ import annotations

import datetime
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load, save

from composer_path.checkpoints.guarded import GuardedPlanner, GuardedReader, load_sharded


def content(value: float) -> dict[str, Any]:
    """Everything that a run keeps, filled by one number."""
    return {
        "state": {
            "weight": torch.full((3, 4), float(value)),
            "half": torch.full((5,), value, dtype=torch.bfloat16),
            "empty": torch.empty(0),
            "wct": datetime.timedelta(seconds=value),
            "step": int(value),
            "loss": float(value),
            "betas": (value, "text", None),
            "groups": [{"lr": value, "moment": torch.full((2,), value)}],
            "numpy": np.float64(value),
        },
        "rng": [
            {
                "numpy": np.random.RandomState(int(value)).get_state(),
                "python": random.Random(int(value)).getstate(),
                "torch": torch.full((5056,), int(value), dtype=torch.uint8),
            }
        ],
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    save(content(3), checkpoint_id=folder)
    return folder


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    else:
        assert np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs


def test_all_kinds_of_values_come_back_as_by_torchs_own_reader(written: Path) -> None:
    ours, theirs = content(7), content(7)
    load_sharded(ours, GuardedReader(written), alone=True)
    load(theirs, storage_reader=FileSystemReader(written))
    assert_same(ours, theirs)
    assert_same(ours, content(3))


def test_a_part_of_a_tensor_is_read_where_it_belongs(written: Path) -> None:
    reader = GuardedReader(written)
    target = {"state": {"weight": torch.zeros(3, 4), "groups": [{"moment": torch.zeros(2)}]}}
    load_sharded(target, reader, alone=True)
    assert target["state"]["weight"].eq(3).all() and target["state"]["groups"][0]["moment"].eq(3).all()  # type: ignore


def test_what_the_checkpoint_lacks_is_an_error_unless_a_part_is_wanted(written: Path) -> None:
    target = {"state": {"weight": torch.zeros(3, 4), "more": torch.zeros(2)}}
    with pytest.raises(ValueError, match=r"checkpoint '.*': rank 0: .*state\.more"):
        load_sharded(target, GuardedReader(written), alone=True)
    load_sharded(target, GuardedReader(written), partial=True, alone=True)
    assert target["state"]["weight"].eq(3).all() and target["state"]["more"].eq(0).all()


def test_another_shape_is_one_line(written: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint '.*': rank 0: Size mismatch"):
        load_sharded({"state": {"weight": torch.zeros(4, 4)}}, GuardedReader(written), alone=True)


def test_a_flipped_bit_of_a_tensor_is_named(written: Path, tmp_path: Path) -> None:
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    at = data.index(torch.full((12,), 3.0).numpy().tobytes())
    data[at + 3] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"entry 'state\.weight' in __0_0\.distcp: .* doesn't match its checksum"):
        load_sharded(content(7), GuardedReader(tmp_path), alone=True)


def test_the_planner_keeps_flat_state_dicts_too(written: Path) -> None:
    target = {"state.weight": torch.zeros(3, 4), "state.wct": None}
    load(target, storage_reader=GuardedReader(written), planner=GuardedPlanner(False, False))
    assert target["state.wct"] == datetime.timedelta(seconds=3)
