"""A checkpoint of any kind of run goes on in any other kind, also one of an earlier version."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.callbacks import CheckpointSaver as ComposersSaver
from tiny_run import BARE, Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of

from composer_path.train import train

KINDS = {"fsdp2": [], "ddp": ["trainer.parallelism_config=null"]}
MORE = ["eval_loader=null", "model.projector.weights=null", "trainer.max_duration=3ba"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trainer, witness = run(load_tiny_config("finetune", shards, tmp_path_factory.mktemp("undisturbed"), [*MORE, *BARE]))
    return witness.notes() | {"weights": weights_of(trainer)}


@pytest.fixture(scope="module")
def stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of runs of each kind that were stopped after two steps, by this version and an earlier one."""
    found = {}
    for kind, parallelism in KINDS.items():
        for version in ("now", "earlier"):
            root = tmp_path_factory.mktemp(f"{kind}_{version}")
            interval = "2ba" if version == "now" else "null"
            more = [*MORE, *parallelism, f"trainer.save_interval={interval}", "trainer.autoresume=false"]
            config, checkpoints = load_tiny_config("finetune", shards, root, more), root / "finetune" / "checkpoints"
            saver = ComposersSaver(str(checkpoints), save_interval="2ba")
            with pytest.raises(Interrupted):
                train(config, loggers=[Witness(2)], callbacks=[saver] if version == "earlier" else [])
            found[f"{kind}_{version}"] = checkpoints
    return found


NAMES = {
    "fsdp2_now": "ep0-ba2",
    "ddp_now": "ep0-ba2",
    "fsdp2_earlier": "ep0-ba2",
    "ddp_earlier": "ep0-ba2-rank0.pt",
}


@pytest.mark.parametrize("into", KINDS)
@pytest.mark.parametrize("source", NAMES)
def test_it_goes_on_bit_for_bit(
    stopped: dict[str, Path],
    undisturbed: dict[str, Any],
    shards: Path,
    tmp_path: Path,
    source: str,
    into: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = stopped[source] / NAMES[source]
    assert path.exists()
    more = [*MORE, *BARE, *KINDS[into], f"trainer.load_path={path}"]
    with caplog.at_level(logging.INFO):
        trainer, witness = run(load_tiny_config("finetune", shards, tmp_path, more))
    assert witness.losses == {2: undisturbed["losses"][2]} and witness.samples[2] == undisturbed["samples"][2]
    weights = weights_of(trainer)
    assert all(torch.equal(weights[name], value) for name, value in undisturbed["weights"].items())
    lines = [record.getMessage() for record in caplog.records]
    assert f"goes on from {path}, after step 2" in lines
    unknown = f"checkpoint {path} has no manifest: it can't be told whether it is whole"
    assert (unknown in lines) == source.endswith("earlier")


def test_an_earlier_versions_run_goes_on_by_the_same_command(
    stopped: dict[str, Path], undisturbed: dict[str, Any], shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for source in ("fsdp2_earlier", "ddp_earlier"):
        root = stopped[source].parent.parent
        with caplog.at_level(logging.WARNING):
            _, witness = run(load_tiny_config("finetune", shards, root, [*MORE, "trainer.save_interval=3ba"]))
        assert witness.losses == {2: undisturbed["losses"][2]}
        assert f"{NAMES[source]} is of an earlier version and has no manifest" in caplog.text
        assert {path.name for path in stopped[source].iterdir()} == {"ep1-ba3", "latest"}  # keeps one
