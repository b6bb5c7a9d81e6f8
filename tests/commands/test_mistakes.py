"""What a user gets wrong after the YAML's check is one line and exit code 2, on one rank as on two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from faulty_run import Outcome, go
from tiny_run import convert_shards

EVALUATED = [
    "eval_loader={dataset: {local: SHARDS/heldout, max_seq_len: 320, template: llava_llama_2}, "
    "global_batch_size: 4, num_workers: 0}",
    "trainer.eval_interval=500ba",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


def broken_shard(shards: Path, folder: Path) -> list[str]:
    """A set whose only shard lost its end."""
    shutil.copytree(shards / "train", folder / "broken")
    shard = next((folder / "broken").rglob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-7])
    return [f"train_loader.dataset.local={folder / 'broken'}"]


def weights_of_text(shards: Path, folder: Path) -> list[str]:
    (folder / "projector.safetensors").write_text("no weights")
    return [f"model.projector.weights={folder / 'projector.safetensors'}"]


def weights_of_another(shards: Path, folder: Path) -> list[str]:
    (folder / "mm_projector.bin").write_bytes(b"PK\x03\x04 no zip")
    return [f"model.projector.weights={folder / 'mm_projector.bin'}"]


def a_file_for_a_folder(shards: Path, folder: Path) -> list[str]:
    (folder / "runs").touch()
    return [f"save_root={folder / 'runs'}"]


def missing_bucket(shards: Path, folder: Path) -> list[str]:
    return [
        f"train_loader.dataset={{local: {folder / 'cache'}, remote: {folder / 'no' / 'such'}, fault_timeout: 1}}",
    ]


def missing_gpu(shards: Path, folder: Path) -> list[str]:
    return ["trainer.device=gpu"]


def early_stopper(shards: Path, folder: Path) -> list[str]:
    stopper = "threshold_stopper: {monitor: token_loss, dataloader_label: heldout, threshold: 1000}"
    return [words.replace("SHARDS", str(shards)) for words in EVALUATED] + [f"callbacks={{{stopper}}}"]


MISTAKES = {
    broken_shard: "shard.00000.mds of ",
    weights_of_text: "projector.safetensors",
    weights_of_another: "mm_projector.bin",
    a_file_for_a_folder: "/runs",
    missing_bucket: "index.json of ",
    missing_gpu: "trainer.device: rank 0 needs a GPU of its own; found 0",
    early_stopper: "callbacks.threshold_stopper: must let the run have steps",
}


OF_TWO_RANKS = (broken_shard, weights_of_text)  # the others are slow
EACH = [
    pytest.param(mistake, ranks, id=f"{mistake.__name__}-{ranks}", marks=[pytest.mark.slow] * slow)
    for mistake in MISTAKES
    for ranks in (1, 2)
    for slow in [ranks == 2 and mistake not in OF_TWO_RANKS]
]


@pytest.mark.parametrize(("mistake", "ranks"), EACH)
def test_a_mistake_is_one_line_of_one_rank(mistake, ranks: int, shards: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    outcome = go(tmp_path, shards, mistake(shards, tmp_path), ranks=ranks)
    both = outcome.stdout + outcome.stderr
    assert (outcome.code, "Traceback" in both, "please report" in both) == (2, False, False), both
    lines = [line for line in both.splitlines() if "composer-path train: " in line]
    assert len(lines) == 1 and MISTAKES[mistake] in lines[0], both


def test_a_run_shorter_than_its_evaluation_interval_has_its_last_evaluation_in_its_summary(
    shards: Path, tmp_path: Path
) -> None:
    outcome: Outcome = go(tmp_path, shards, [words.replace("SHARDS", str(shards)) for words in EVALUATED])
    assert outcome.code == 0
    found = json.loads((outcome.folder / "summary.json").read_text())["heldout_token_loss"]
    assert found["after"] < found["before"]
