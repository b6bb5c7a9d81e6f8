"""Every optimizer and schedule that a YAML may name trains and goes on exactly; others are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from config_problems import problems_of
from tiny_run import REPO_ROOT, Interrupted, Witness, convert_shards, largest_error, run, tiny_overrides, weights_of

from composer_path.config.reading import load_config
from composer_path.run.lion import Lion
from composer_path.run.names import library_classes
from composer_path.run.optimizer import OPTIMIZERS, REFUSED

FINETUNE = REPO_ROOT / "yamls" / "demo" / "finetune.yaml"
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {"t_warmup": "1ba"},
    "cosine": {},
    "cosine_warm_restarts": {"t_0": "2ba"},
    "cosine_with_warmup": {"t_warmup": "1ba"},
    "exponential": {"gamma": 0.9},
    "linear": {},
    "linear_with_warmup": {"t_warmup": "1ba"},
    "multi_step": {"milestones": ["1ba"]},
    "multi_step_with_warmup": {"t_warmup": "1ba", "milestones": ["2ba"]},
    "polynomial": {"power": 2.0},
    "polynomial_with_warmup": {"t_warmup": "1ba", "power": 2.0},
    "step": {"step_size": "1ba"},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


def train(root: Path, shards: Path, *more: str, stop_after: int | None = None) -> tuple[Any, Witness]:
    """Three steps, with a checkpoint after each."""
    emptied = {word.partition("=")[0] for word in more if word.endswith("=null")}
    base = [one for one in tiny_overrides("finetune", shards, root) if one.partition("=")[0] not in emptied]
    few = ["trainer.max_duration=3ba", "trainer.save_interval=1ba", "eval_loader=null", "model.projector.weights=null"]
    return run(load_config(FINETUNE, [*base, "algorithms=null", *few, *more]), Witness(stop_after))


QUICK, CONDITIONAL = ("lion",), {"adafactor": ["trainer.parallelism_config=null"]}
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in OPTIMIZERS]


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_by_name_trains_and_goes_on_exactly(name: str, shards: Path, tmp_path: Path) -> None:
    words = [
        "optimizer=null",
        f"optimizer={{name: {name}, lr: 1.0e-3, weight_decay: 0.01}}",
        *CONDITIONAL.get(name, []),
    ]
    trainer, witness = train(tmp_path / "whole", shards, *words)
    assert witness.losses[2] < witness.losses[0]
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", shards, *words, stop_after=1)
    resumed, _ = train(tmp_path / "stopped", shards, *words)
    assert largest_error(weights_of(resumed), weights_of(trainer)) == 0


def test_lion_steps_as_its_paper_says() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    expected, kept = weight.detach().clone(), torch.zeros(3)
    for gradient in (torch.tensor([0.3, -0.1, 0.0]), torch.tensor([-4.0, 0.2, 0.1])):
        weight.grad = gradient.clone()
        optimizer.step()
        expected = expected - 0.1 * (torch.sign(0.9 * kept + 0.1 * gradient) + 0.5 * expected)
        kept = 0.99 * kept + 0.01 * gradient
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_cant_work_here_is_refused_with_the_reason(name: str) -> None:
    line = f"optimizer.name: found '{name}'; {REFUSED[name]}"
    assert line in problems_of(FINETUNE, "optimizer=null", f"optimizer={{name: {name}, lr: 1.0e-3}}")


def test_adafactor_is_refused_where_it_would_fail_at_the_first_step() -> None:
    (problem,) = problems_of(FINETUNE, "optimizer=null", "optimizer={name: adafactor, lr: 1.0e-3}")
    assert problem.startswith("optimizer.name: found 'adafactor'; ") and "trainer.parallelism_config=null" in problem


@pytest.mark.parametrize("switch", ["maximize", "capturable", "differentiable"])
def test_a_switch_that_would_do_harm_is_refused(switch: str) -> None:
    (problem,) = problems_of(FINETUNE, f"optimizer.{switch}=true")
    assert problem.startswith(f"optimizer.{switch}: is not set here; ")


def test_every_schedule_is_tried() -> None:
    assert set(SCHEDULES) == set(library_classes("scheduler"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_by_name_runs(name: str, shards: Path, tmp_path: Path) -> None:
    keywords = "".join(f", {key}: {value}" for key, value in SCHEDULES[name].items()).replace("'", "")
    words = ["scheduler=null", f"scheduler={{name: {name}{keywords}}}", "callbacks.lr_monitor={}"]
    _, witness = train(tmp_path, shards, *words)
    (rates, *_) = [found for key, found in witness.metrics.items() if key.startswith("lr-")]
    assert len(rates) == 3 and all(0 <= rate <= 2e-3 for rate in rates) and (len(set(rates)) > 1 or name == "constant")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("algorithms.low_precision_layernorm={}", "all in bf16 already: it changes nothing; leave it out"),
        ("algorithms.mixup={}", "a batch here is a row of conversations; use neftune"),
        ("callbacks.scheduled_gc={}", "llm-foundry's isn't there; leave it out"),
        ("callbacks.learning_rate_monitor={}", "use lr_monitor"),
        ("loggers.tensor_board={}", "use tensorboard"),
    ],
)
def test_names_of_other_libraries_get_the_name_here(words: str, line: str) -> None:
    (problem,) = problems_of(FINETUNE, words)
    assert problem.startswith(words.removesuffix("={}") + ": is not set here; ") and line in problem
