"""A resumed run has everything as it was, but for what the YAML says anew of optimizer and scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bare_trainer import Bare, Notes, rows, trainer_of
from composer.core import Callback, State
from composer.loggers import Logger
from composer.optim import ConstantScheduler, LinearScheduler
from safetensors.torch import load_file
from tiny_run import Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of

from composer_path.checkpoints.folder import CheckpointFolder
from composer_path.checkpoints.manifest import CheckpointError
from composer_path.checkpoints.newest import Found, newest_whole
from composer_path.checkpoints.resume import Resume
from composer_path.checkpoints.saver import CheckpointSaver
from composer_path.checkpoints.trained_only import TrainedOnly
from composer_path.train import train


class Stop(Callback):
    """Ends the process's part of the run before a step."""

    def __init__(self, before: int | None = None) -> None:
        self.before = before

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.before:
            raise InterruptedError


def leg(path: Path, stop: Stop, notes: Notes | None = None, weights_only: bool = False, **keywords: Any) -> Any:
    """A part of a run of six steps that saves each step."""
    lr, model = keywords.pop("lr", 0.1), keywords.pop("model", None) or Bare()
    more = {key: keywords.pop(key) for key in ("weight_decay", "betas") if key in keywords}
    folder = CheckpointFolder(path)
    found = newest_whole(folder)
    saver = CheckpointSaver(folder, "1ba")
    if found is not None and found.manifest is not None:
        saver.go_on_from(found.manifest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **more)
    callbacks = [notes or Notes(), stop, Resume(found, weights_only, TrainedOnly(model)), saver]
    trainer = trainer_of(rows([]), model=model, optimizers=optimizer, callbacks=callbacks, **keywords)
    try:
        trainer.fit()
    except InterruptedError:
        assert stop.before is not None
    finally:
        trainer.close()
    return trainer


def test_rates_follow_the_yaml_from_the_first_resumed_step_on(tmp_path: Path) -> None:
    first, second = Notes(), Notes()
    schedule = {"schedulers": LinearScheduler(alpha_i=1.0, alpha_f=0.0, t_max="8ba"), "max_duration": "3ba"}
    leg(tmp_path, Stop(), first, **schedule)
    leg(tmp_path, Stop(), second, **schedule | {"max_duration": "6ba"}, lr=0.01)
    before, after = ([rate for [rate] in notes.rates] for notes in (first, second))
    assert before == pytest.approx([0.1, 0.1, 0.0875])  # Composer's rates lag by a step
    assert after[:3] == pytest.approx([0.0075, 0.00625, 0.005])


def test_without_a_change_rates_and_moments_are_the_undisturbed_runs(tmp_path: Path) -> None:
    schedule = {"schedulers": LinearScheduler(alpha_i=1.0, alpha_f=0.0, t_max="8ba"), "max_duration": "3ba"}
    whole, second = Notes(), Notes()
    leg(tmp_path / "whole", Stop(), whole, **schedule)
    leg(tmp_path / "parts", Stop(before=2), Notes(), **schedule)
    trainer = leg(tmp_path / "parts", Stop(), second, **schedule)
    assert [*second.rates] == whole.rates[2:]
    [moments] = {len(state) for state in trainer.state.optimizers[0].state.values()}
    assert moments == 3


@pytest.mark.parametrize(("key", "value"), [("weight_decay", 0.5), ("betas", (0.5, 0.6))])
def test_hyperparameters_follow_the_yaml(tmp_path: Path, key: str, value: Any) -> None:
    leg(tmp_path, Stop(before=2))
    trainer = leg(tmp_path, Stop(), **{key: value})
    assert {group[key] for group in trainer.state.optimizers[0].param_groups} == {value}


def test_a_rate_of_0_in_the_checkpoint_becomes_the_yamls(tmp_path: Path) -> None:
    notes = Notes()
    leg(tmp_path, Stop(before=2), lr=0.0, schedulers=ConstantScheduler())
    leg(tmp_path, Stop(), notes, lr=0.25, schedulers=ConstantScheduler())
    assert {rate for [rate] in notes.rates} == {0.25}


class Draws(Witness):
    """Draws a random number in each step, as a model with dropout does."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(stop_after)
        self.drawn: dict[int, float] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        super().batch_start(state, logger)
        self.drawn[self.step] = torch.rand(1).item()


def test_random_numbers_go_on_amid_an_epoch_at_its_last_batch_and_at_its_end(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shards = convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")
    more = ["eval_loader=null", "model.projector.weights=null"]

    def config(name: str, interval: str) -> Any:
        return load_tiny_config("finetune", shards, tmp_path / name, [*more, f"trainer.save_interval={interval}"])

    _, whole = run(config("whole", "1ep"), Draws())
    for interval, stops in (("1ba", [1, 3, 5]), ("1ep", [3])):
        drawn: dict[int, float] = {}
        for stop in stops:
            part = Draws(stop)
            with pytest.raises(Interrupted):
                run(config(interval, interval), part)
            drawn |= part.drawn
        _, last = run(config(interval, interval), Draws())
        assert drawn | last.drawn == whole.drawn


class FreezesParts(Callback):
    """The pooler before the first step, so that its optimizer never begins; the MLP at the second, and never again."""

    def batch_start(self, state: State, logger: Logger) -> None:
        part = {0: "pooler", 1: "mlp"}.get(state.timestamp.batch.value)
        if part is not None:
            getattr(state.model.model.projector, part).requires_grad_(False)


@pytest.mark.parametrize("kind", ["sharded", "whole"])
def test_a_run_whose_callback_freezes_parts_goes_on_to_the_same_weights_and_writes_all_of_them(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    shards = convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")
    more = ["eval_loader=null", "trainer.max_duration=3ba", "trainer.save_interval=1ba"]
    more += ["trainer.parallelism_config=null"] if kind == "whole" else []

    def leg(name: str, stop: int | None) -> dict[str, torch.Tensor]:
        config = load_tiny_config("pretrain", shards, tmp_path / name, more)
        return weights_of(train(config, callbacks=[FreezesParts()], loggers=[Witness(stop)]))

    undisturbed = leg("undisturbed", None)
    with pytest.raises(Interrupted):
        leg("resumed", 2)
    resumed = leg("resumed", None)
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
    for name in ("undisturbed", "resumed"):
        written = load_file(tmp_path / name / "pretrain" / "projector.safetensors")
        trained = {key.removeprefix("projector."): value for key, value in undisturbed.items() if "projector." in key}
        assert written.keys() == trained.keys()
        assert all(torch.equal(written[key], value) for key, value in trained.items())


def test_weights_alone_leave_the_rest_new(tmp_path: Path) -> None:
    trained = leg(tmp_path, Stop(before=2)).state.model.state_dict()
    model, notes = Bare(), Notes()
    found = newest_whole(CheckpointFolder(tmp_path))
    trainer = trainer_of(rows([]), model=model, callbacks=[notes, Resume(found, True, TrainedOnly(model))])
    assert all(torch.equal(value, trained[name]) for name, value in trainer.state.model.state_dict().items())
    assert trainer.state.timestamp.batch.value == 0 and trainer.state.run_name != "bare"
    trainer.close()


class Wider(Bare):
    """Another model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Linear(5, 1))


class Deeper(Bare):
    """One with more in it."""

    def __init__(self) -> None:
        super().__init__()
        self.model.append(torch.nn.Linear(1, 1))


class Shallower(Bare):
    """One with less in it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Wider, "Size mismatch"),
        (Deeper, r"it lacks \d+ entries, such as state.model.model.2"),
        (Shallower, "it holds in addition"),
    ],
)
def test_another_models_checkpoint_is_refused(tmp_path: Path, model: type[Bare], found: str) -> None:
    leg(tmp_path, Stop(before=2))
    with pytest.raises(CheckpointError, match=rf"checkpoint {tmp_path}/ep0-ba2: can't be taken: .*{found}"):
        leg(tmp_path, Stop(), model=model())


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    model = Bare()
    resume = Resume(Found(tmp_path / "other.pt", None), False, TrainedOnly(model))
    with pytest.raises(CheckpointError, match=r"other\.pt: can't be taken: it is no checkpoint of a run"):
        trainer_of(rows([]), model=model, callbacks=[resume])
