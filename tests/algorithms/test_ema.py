"""The moving average: its rule, who sees it, that training doesn't, and that ranks, resume and export keep it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import State, Timestamp
from composer.loggers import Logger
from launched_ranks import launch
from safetensors.torch import load_file
from tiny_run import Interrupted, Witness, convert_shards, largest_error, load_tiny_config, plain_name, run, weights_of

from composer_path.algorithms import EMA
from composer_path.algorithms.ema import check_average
from composer_path.run.export import export_checkpoint

SMOOTHING = 2**-0.5  # of a half-life of two steps
AVERAGING = ["algorithms={ema: {half_life: 2ba}}"]
SHORT = [
    *("model.projector.weights=null", "algorithms=null", "callbacks=null", "callbacks.save_weights.interval=3ba"),
    *("trainer.max_duration=3ba", "trainer.save_interval=1ba", "trainer.eval_interval=1ba"),
    *("trainer.save_num_checkpoints_to_keep=-1", "model.trainable=[projector, language_model]"),
]
DDP = ["trainer.parallelism_config=null"]


class Follower(Witness):
    """Notes the weights of each step, the averages beside them, and what an evaluation sees."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(stop_after)
        self.weights: list[dict[str, torch.Tensor]] = []
        self.averages: list[dict[str, torch.Tensor]] = []
        self.evaluated: list[dict[str, torch.Tensor]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        [ema] = [one for one in state.algorithms if isinstance(one, EMA)]
        self.weights.append({name: whole(weight) for name, weight in ema.weights.items()})
        self.averages.append({name: whole(average) for name, average in ema.averages.items()})

    def eval_start(self, state: State, logger: Logger) -> None:
        if self.weights:
            trained = {plain_name(name): p for name, p in state.model.named_parameters()}
            self.evaluated.append({name: whole(trained[name]) for name in self.weights[-1]})


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "shards")


@pytest.fixture(scope="module")
def followed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Follower, Path]]:
    """An undisturbed run under FSDP2, with an evaluation and a checkpoint after each step."""
    root = tmp_path_factory.mktemp("ema")
    config = load_tiny_config("finetune", shards, root, [*SHORT, *AVERAGING])
    witness = Follower()
    trainer, _ = run(config, witness)
    yield config, trainer, witness, root / "finetune"


def test_averages_follow_the_rule_from_the_first_step_on(followed: Any) -> None:
    witness = followed[2]
    expected = witness.weights[0]
    for weights, averages in zip(witness.weights, witness.averages, strict=True):
        expected = {name: SMOOTHING * expected[name] + (1 - SMOOTHING) * weights[name] for name in weights}
        assert largest_error(averages, expected) < 1e-6
    assert largest_error(witness.averages[-1], witness.weights[-1]) > 1e-3


def test_evaluations_see_the_averages_and_training_goes_on_without_them(followed: Any, shards: Path) -> None:
    _, trainer, witness, root = followed
    assert len(witness.evaluated) == 3
    for seen, averages in zip(witness.evaluated, witness.averages, strict=True):
        assert largest_error(seen, averages) == 0
    plain, other = run(load_tiny_config("finetune", shards, root.parent / "plain", SHORT))
    assert largest_error(weights_of(trainer), weights_of(plain)) == 0
    assert witness.metrics["metrics/heldout/token_loss"] != other.metrics["metrics/heldout/token_loss"]


def test_the_written_model_and_an_export_of_the_checkpoint_are_the_averages(followed: Any, tmp_path: Path) -> None:
    config, _, witness, folder = followed
    export_checkpoint(folder / "checkpoints" / "latest", config, tmp_path / "out")
    for model in (folder / "model", tmp_path / "out"):
        found: dict[str, torch.Tensor] = {}
        for file in model.glob("model*.safetensors"):
            found |= load_file(file)
        averages = witness.averages[-1]
        written = {name: found[name].float()[: len(averages[name])] for name in averages}  # but for the image's row
        assert largest_error(written, averages) < 1e-6


@pytest.mark.parametrize("other", [[], DDP], ids=["fsdp2", "ddp"])
def test_a_resumed_run_goes_on_with_its_averages(followed: Any, shards: Path, tmp_path: Path, other: list[str]) -> None:
    """Also where the second process is DDP: a checkpoint is the same for all kinds of runs."""
    overrides = [*SHORT, *AVERAGING]
    with pytest.raises(Interrupted):
        run(load_tiny_config("finetune", shards, tmp_path, overrides), Follower(stop_after=2))
    witness = Follower()
    run(load_tiny_config("finetune", shards, tmp_path, [*overrides, *other]), witness)
    assert largest_error(witness.averages[-1], followed[2].averages[-1]) < 1e-6


def test_a_run_that_takes_it_up_later_begins_with_its_weights(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(load_tiny_config("finetune", shards, tmp_path, SHORT), Witness(stop_after=2))
    witness = Follower()
    run(load_tiny_config("finetune", shards, tmp_path, [*SHORT, *AVERAGING]), witness)
    assert largest_error(witness.averages[-1], witness.weights[-1]) == 0


def test_before_its_start_the_averages_are_the_weights(shards: Path, tmp_path: Path) -> None:
    late = ["algorithms={ema: {half_life: 2ba, ema_start: 9ba}}", "eval_loader=null"]
    config = load_tiny_config("finetune", shards, tmp_path, [*SHORT, *late])
    witness = Follower()
    run(config, witness)
    export_checkpoint(tmp_path / "finetune" / "checkpoints" / "latest", config, tmp_path / "out")
    found = load_file(next((tmp_path / "out").glob("model*.safetensors")))
    weights = witness.weights[-1]
    assert largest_error({name: found[name][: len(weights[name])] for name in weights}, weights) < 1e-6


def test_a_checkpoint_amid_an_evaluation_holds_the_training_weights() -> None:
    """A signal ends an evaluation with a checkpoint, see `composer_path.guards`."""
    from composer_path.checkpoints.saver import contents

    model = torch.nn.Linear(2, 1, bias=False)
    ema = EMA(smoothing=0.5, half_life=None)
    ema.model, ema.weights = model, {"weight": model.weight}
    ema.averages, ema.started = {"weight": torch.zeros(1, 2)}, True
    before = model.weight.detach().clone()
    ema._show(averages=True)
    assert not model.weight.any()

    class Stub(State):
        algorithms, optimizers = [ema], ()  # type: ignore[assignment]

        def __init__(self) -> None:
            pass

        def state_dict(self) -> dict[str, Any]:
            return {"algorithms": [("EMA", ema.state_dict())], "model": {"weight": model.weight.detach().clone()}}

    found = contents(Stub())["state"]
    assert torch.equal(found["model"]["weight"], before)
    assert not found["algorithms"]["EMA"]["averages"]["weight"].any()


@pytest.mark.parametrize(
    ("keywords", "problem"),
    [
        ({"half_life": None, "smoothing": None}, "found neither half_life nor smoothing"),
        ({"half_life": "1ba", "smoothing": 0.5}, "found both"),
        ({"half_life": None, "smoothing": 1.0}, "must be above 0 and below 1"),
        ({"half_life": "1ba", "update_interval": "1ep"}, "both must be in ba, or both in ep"),
        ({"half_life": "9tok"}, "both must be in ba"),
        ({"half_life": "1ba", "ema_start": "3tok"}, "ema_start: found 3tok"),
    ],
)
def test_what_can_not_be_averaged_so_is_refused(keywords: dict[str, Any], problem: str) -> None:
    settings = {"smoothing": None, "ema_start": "0dur", "update_interval": None} | keywords
    with pytest.raises(ValueError, match=problem):
        check_average(**settings)


def test_an_interval_of_several_steps_counts_as_many_in_the_half_life() -> None:
    smoothing, _, interval = check_average("100ba", None, "0.0dur", "10ba")
    assert smoothing == pytest.approx(2**-0.1)
    assert Timestamp(batch=20).get("ba").value % interval.value == 0


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_sharded_or_not_write_what_one_does(followed: Any, shards: Path, tmp_path: Path) -> None:
    legs = [
        {"name": name, "stage": "finetune", "overrides": [*SHORT, *AVERAGING, *more]}
        for name, more in (("sharded", []), ("ddp", DDP))
    ]
    launched = launch(2, "two_ranks.py", legs, shards, tmp_path)
    assert set(launched.notes) == {"sharded", "ddp"}, launched.output[-4000:]
    models = [
        load_file(next((tmp_path / name / "finetune" / "model").glob("model*.safetensors"))) for name in launched.notes
    ]
    averages = followed[2].averages[-1]
    for model in models:
        assert largest_error({name: model[name] for name in averages}, averages) < 1e-4  # sums in another order
    assert largest_error(*({name: model[name] for name in averages} for model in models)) < 1e-6
