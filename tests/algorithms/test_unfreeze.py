"""Unfreezing: a module waits for its moment untouched, then learns; checkpoints are complete and resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import State
from composer.loggers import Logger
from tiny_run import Interrupted, Witness, convert_shards, largest_error, load_tiny_config, plain_name, run, weights_of

from composer_path.algorithms import Unfreeze
from composer_path.run.export import export_checkpoint

SHORT = [
    *("model.projector.weights=null", "algorithms=null", "callbacks=null", "eval_loader=null"),
    *("trainer.max_duration=4ba", "trainer.save_interval=1ba", "optimizer.weight_decay=0.1"),
    "scheduler.t_warmup=0ba",
]
LATER = ["algorithms={unfreeze: {language_model: 2ba}, gradient_clipping: {clipping_type: norm}}"]
LATER += ["algorithms.gradient_clipping.clipping_threshold=0.5"]
DDP = ["trainer.parallelism_config=null"]
MICROBATCHES = ["train_loader.max_tokens_per_microbatch=320"]


class Follower(Witness):
    """Notes the language model's weights after each step, and which weights have moments."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(stop_after)
        self.weights: list[dict[str, torch.Tensor]] = []
        self.moments: list[set[str]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        named: dict[str, Any] = {plain_name(name): p for name, p in state.model.named_parameters()}
        local = {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in named.items()}
        self.weights.append(local)
        self.moments.append({name for name, p in named.items() if p in state.optimizers[0].state})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "shards")


def part(weights: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if name.startswith(module)}


@pytest.fixture(scope="module")
def followed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same run under FSDP2, under DDP, and in microbatches."""
    found: dict[str, Any] = {}
    for name, more in (("fsdp2", []), ("ddp", DDP), ("cut", MICROBATCHES)):
        root, witness = tmp_path_factory.mktemp(name), Follower()
        config = load_tiny_config("finetune", shards, root, [*SHORT, *LATER, *more])
        trainer, _ = run(config, witness)
        found[name] = witness, weights_of(trainer), root, config
    return found


@pytest.mark.parametrize("kind", ["fsdp2", "ddp", "cut"])
def test_until_its_moment_a_module_has_neither_changes_nor_moments(followed: dict[str, Any], kind: str) -> None:
    witness = followed[kind][0]
    first, second, third, _ = (part(weights, "language_model") for weights in witness.weights)
    assert largest_error(second, first) == 0  # no weight decay either
    assert largest_error(third, second) > 1e-4
    one, two = (part(weights, "projector") for weights in witness.weights[:2])
    assert largest_error(two, one) > 1e-4
    assert not any(name.startswith("language_model") for name in witness.moments[1])
    assert any(name.startswith("language_model") for name in witness.moments[2])
    assert witness.metrics["unfreeze/language_model"] == [0, 0, 1, 1]


def test_sharding_and_microbatches_do_not_matter(followed: dict[str, Any]) -> None:
    for kind in ("ddp", "cut"):
        assert largest_error(followed[kind][1], followed["fsdp2"][1]) < 1e-3


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_goes_on_exactly(followed: dict[str, Any], shards: Path, tmp_path: Path, stop: int) -> None:
    config = load_tiny_config("finetune", shards, tmp_path, [*SHORT, *LATER])
    with pytest.raises(Interrupted):
        run(config, Follower(stop_after=stop))
    trainer, _ = run(config, Follower())
    assert largest_error(weights_of(trainer), followed["fsdp2"][1]) == 0


def test_a_checkpoint_from_before_the_moment_is_complete(shards: Path, tmp_path: Path) -> None:
    config = load_tiny_config("finetune", shards, tmp_path / "run", [*SHORT, *LATER])
    witness = Follower(stop_after=1)
    with pytest.raises(Interrupted):
        run(config, witness)
    model = export_checkpoint(tmp_path / "run" / "finetune" / "checkpoints" / "latest", config, tmp_path / "out")
    assert {name.partition(".")[0] for name in model.state_dict()} >= {"language_model", "projector"}


def test_moments_are_steps_epochs_or_shares_of_the_run() -> None:
    assert (
        repr(Unfreeze(projector="0.5dur", language_model="2ba")) == "Unfreeze(projector='0.5dur', language_model='2ba')"
    )
    with pytest.raises(ValueError, match=r"unfreeze\.projector: found 3tok; it must be in ba, ep or dur"):
        Unfreeze(projector="3tok")
