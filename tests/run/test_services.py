"""wandb and mlflow, without a network: a run's settings, losses and held-out losses lie in their own files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import REPO_ROOT, convert_shards

RUN = """
import sys
from pathlib import Path
from tiny_run import load_tiny_config
from composer_path.train import train

shards, root, *words = sys.argv[1:]
train(load_tiny_config("pretrain", Path(shards), Path(root), ["loggers=null", "trainer.max_duration=2ba", *words]))
"""


def run_with(words: list[str], root: Path, shards: Path, **environment: str) -> None:
    """Two steps in a process of their own: both leave threads and hooks behind."""
    path = os.pathsep.join([str(REPO_ROOT), str(REPO_ROOT / "tests")])
    known = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", RUN, shards, root, *words], env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


def test_mlflow_has_every_setting_and_each_steps_loss(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow isn't installed")
    store = tmp_path / "store"
    words = [f"loggers.mlflow={{experiment_name: tiny, tracking_uri: 'file://{store}', log_system_metrics: false}}"]
    run_with(words, tmp_path / "out", shards)
    (rate,) = store.glob("*/*/params/optimizer.lr")
    assert rate.read_text() == "0.002"
    assert (rate.parent / "train_loader.dataset.max_seq_len").read_text() == "128"
    losses = (rate.parent.parent / "metrics" / "loss" / "train" / "total").read_text().splitlines()
    assert len(losses) == 2
    assert (rate.parent.parent / "metrics" / "metrics" / "heldout" / "token_loss").is_file()


def test_wandb_offline_has_every_setting(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb isn't installed")
    words = ["loggers.wandb={project: tiny, rank_zero_only: true}"]
    run_with(words, tmp_path / "out", shards, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"train_loader.dataset.max_seq_len" in content and b"loss/train/total" in content
