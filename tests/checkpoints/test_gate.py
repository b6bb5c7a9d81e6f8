"""A checkpoint that would run code is refused before anything in it is called."""

from __future__ import annotations

import datetime
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, save

from composer_path.checkpoints.gate import is_harmless, read_pickle, require_safe_checkpoints


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


def test_a_single_file_like_composers_is_read_with_the_safe_unpickler(tmp_path: Path) -> None:
    state = {
        "model": {"weight": torch.arange(3.0)},
        "rng": np.random.RandomState(0).get_state()[1],
        "wct": datetime.timedelta(seconds=3),
        "version": torch.torch_version.TorchVersion("2.7.0"),
    }
    torch.save(state, tmp_path / "checkpoint.pt")
    assert is_harmless(tmp_path / "checkpoint.pt")
    again = read_pickle(tmp_path / "checkpoint.pt")
    assert torch.equal(again["model"]["weight"], torch.arange(3.0))
    assert again["wct"] == datetime.timedelta(seconds=3)


def test_a_single_file_that_would_call_the_system_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": Evil(tmp_path / "run")}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"posix\.system"):
        read_pickle(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "run").exists()


def test_a_sharded_checkpoint_is_searched_entry_by_entry(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    save({"weight": torch.ones(4), "wct": datetime.timedelta(1)}, checkpoint_id=good)
    save({"weight": torch.ones(4), "wct": Evil(tmp_path / "run")}, checkpoint_id=bad)
    for folder in (good, bad):
        assert is_harmless(folder / ".metadata")
    entries = {
        folder: [
            (entry.offset, entry.length) for entry in FileSystemReader(folder).read_metadata().storage_data.values()
        ]
        for folder in (good, bad)
    }
    assert is_harmless(good / "__0_0.distcp", entries[good])
    with pytest.raises(ValueError, match=r"posix\.system"):
        is_harmless(bad / "__0_0.distcp", entries[bad])
    assert not (tmp_path / "run").exists()


def test_metadata_that_would_call_the_system_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"posix\.system"):
        is_harmless(tmp_path / ".metadata")
    (tmp_path / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="found the operation"):
        is_harmless(tmp_path / ".metadata")
    assert not (tmp_path / "run").exists()


def test_composer_evaluates_no_text_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from composer.core import State

    require_safe_checkpoints()
    assert os.environ["CHECKPOINT_VALIDATION_FUNCTION"].endswith("is_harmless")
    state = {"algorithms": [("LowPrecisionLayerNorm", {"repr": "__class__.mro()[0 / 0]"})]}
    State._apply_required_algorithms(object(), state, None)  # would evaluate the text otherwise
    monkeypatch.delattr(State, "_apply_required_algorithms")
    with pytest.raises(RuntimeError, match=r"mosaicml 0\.32\.1"):
        require_safe_checkpoints()
