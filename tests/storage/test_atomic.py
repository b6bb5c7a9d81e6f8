"""A file is there whole or not at all, with the rights that the user's mask leaves it, whoever wrote it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from composer_path.storage.atomic import write_whole


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_has_the_rights_that_the_users_mask_leaves_it_also_where_a_library_wrote_it(
    tmp_path: Path, mask: int, durable: bool
) -> None:
    write_whole(tmp_path / "ours", lambda file: file.write(b"1"), durable=durable)
    tensors = {"weight": torch.zeros(2)}
    write_whole(tmp_path / "theirs.safetensors", lambda file: save_file(tensors, file.name), durable=durable)
    write_whole(tmp_path / "owners", lambda file: save_file(tensors, file.name), durable=durable, mode=0o600)
    assert rights(tmp_path / "ours") == rights(tmp_path / "theirs.safetensors") == 0o666 & ~mask
    assert rights(tmp_path / "owners") == 0o600 & ~mask
    assert (tmp_path / "ours").read_bytes() == b"1"


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"earlier")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"earlier"
