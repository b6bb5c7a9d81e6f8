"""The table of Composer's classes is whole, `--check` keeps it, the docs show it, and what it accepts works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import composer.algorithms
import composer.callbacks
import pytest
from composer.core import Algorithm, Callback
from tiny_run import Interrupted, Witness, convert_shards, largest_error, load_tiny_config, run, weights_of

import composer_path.algorithms
from composer_path.config.reading import ConfigError
from composer_path.run.names import snake_name
from composer_path.run.verdicts import ACCEPTED, FOUNDRY, REFUSED, refused

KEYWORDS: dict[str, str] = {
    "gradient_clipping": "{clipping_type: norm, clipping_threshold: 0.5}",
    "ema": "{half_life: 2ba}",
    "early_stopper": "{monitor: token_loss, dataloader_label: heldout}",
    "threshold_stopper": "{monitor: token_loss, dataloader_label: heldout, threshold: 0.1}",
    "optimizer_monitor": "{batch_log_interval: 1}",
    "speed_monitor": "{window_size: 1}",
    "stain_transfer": "{mean: [-0.6, 0.0, 0.0], std: [0.3, 0.05, 0.02]}",
    "unfreeze": "{language_model: 2ba}",
    "image_dropout": "{probability: 0.5}",
}
OURS = [snake_name(name) for name in composer_path.algorithms.__all__]
TRIED = [("algorithms", name) for name in {*ACCEPTED["algorithms"], *OURS}]
TRIED = sorted(TRIED + [("callbacks", name) for name in ACCEPTED["callbacks"]])
SHORT = [
    *("model.projector.weights=null", "algorithms=null", "callbacks=null", "trainer.max_duration=3ba"),
    *("trainer.save_interval=1ba", "trainer.eval_interval=1ba"),
]
BASES: dict[str, Any] = {"algorithms": (composer.algorithms, Algorithm), "callbacks": (composer.callbacks, Callback)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "shards")


@pytest.mark.parametrize("section", sorted(BASES))
def test_each_class_of_composer_has_one_verdict(section: str) -> None:
    package, base = BASES[section]
    classes = {
        snake_name(name).removesuffix("_callback")
        for name, member in vars(package).items()
        if isinstance(member, type) and issubclass(member, base) and member is not base
    }
    assert len(classes) == {"algorithms": 28, "callbacks": 19}[section]
    assert not set(ACCEPTED[section]) & set(REFUSED[section])
    assert set(ACCEPTED[section]) | set(REFUSED[section]) == classes


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section in sorted(BASES) for name in sorted(refused(section))]
)
def test_what_is_refused_is_refused_by_its_reason(section: str, name: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_tiny_config("finetune", shards, tmp_path, [*SHORT, f"{section}={{{name}: {{}}}}"])
    assert f"{section}.{name}: is not set here; {refused(section)[name]}" in str(error.value)


def test_llm_foundrys_names_mean_classes_of_composer() -> None:
    assert set(FOUNDRY.values()) <= set(REFUSED["algorithms"])
    assert not set(FOUNDRY) & (set(REFUSED["algorithms"]) | set(ACCEPTED["algorithms"]))


def test_the_docs_hold_each_verdict_word_for_word(repo_root: Path) -> None:
    text = (repo_root / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for section in sorted(BASES):
        for name, condition in ACCEPTED[section].items():
            assert f"| `{name}` | {condition or 'works'} |" in text
        for name, reason in REFUSED[section].items():
            assert f"| `{name}` | {reason} |" in text
    for name in OURS:
        assert f"`{name}`" in text


CONDITIONS = [
    ("algorithms={stain_jitter: {probability: 2.0}}", "algorithms.stain_jitter: probability must lie between 0 and 1"),
    ("algorithms={neftune: {alpha: 0.0}}", "algorithms.neftune: alpha must be above 0"),
    (
        "algorithms={stain_transfer: {mean: [0.0, 0.0], std: [1.0, 1.0, 1.0]}}",
        "algorithms.stain_transfer: mean: must be three numbers (l, alpha, beta); found 2 numbers",
    ),
    ("algorithms={unfreeze: {language_model: 5tok}}", "algorithms.unfreeze: language_model: found 5tok"),
    ("algorithms={ema: {smoothing: 0.9}}", "algorithms.ema: found both half_life and smoothing"),
    ("algorithms={ema: {half_life: 10tok}}", "algorithms.ema: found a half_life of 10tok"),
    ("algorithms={unfreeze: {}}", "algorithms.unfreeze: names no module"),
    ("algorithms={unfreeze: {vision_encoder: 2ba}}", "algorithms.unfreeze.vision_encoder: is not trained"),
    ("algorithms={unfreeze: {language_model: 3ba}}", "algorithms.unfreeze.language_model: found 3ba, and the run ends"),
    ("algorithms={unfreeze: {language_model: 1dur}}", "algorithms.unfreeze.language_model: found 1dur, and the run"),
    (
        "algorithms={unfreeze: {language_model: 1ba, projector: 2ba}}",
        "algorithms.unfreeze: leaves nothing to train at first",
    ),
    ("callbacks={memory_snapshot: {}} trainer.device=cpu", "callbacks.memory_snapshot: looks at a GPU's memory"),
    (
        "callbacks={early_stopper: {monitor: token_loss, dataloader_label: held_out}}",
        "callbacks.early_stopper.dataloader_label: found 'held_out'; did you mean heldout?",
    ),
    (
        "callbacks={threshold_stopper: {monitor: loss, dataloader_label: heldout, threshold: 1.0}}",
        "callbacks.threshold_stopper.monitor: found 'loss'; it must be token_loss",
    ),
    (
        "eval_loader=null callbacks={early_stopper: {monitor: token_loss, dataloader_label: heldout}}",
        "callbacks.early_stopper: watches an evaluation's metric, and there is no eval_loader",
    ),
]


@pytest.mark.parametrize(("overrides", "problem"), CONDITIONS)
def test_a_condition_that_is_not_met_is_said_at_the_check(
    overrides: str, problem: str, shards: Path, tmp_path: Path
) -> None:
    words = overrides.replace(" callbacks=", "\ncallbacks=").replace(" trainer.", "\ntrainer.").split("\n")
    with pytest.raises(ConfigError) as error:
        load_tiny_config("finetune", shards, tmp_path, [*SHORT, *words])
    assert problem in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp2", "ddp"])
@pytest.mark.parametrize(("section", "name"), TRIED)
def test_what_is_accepted_trains_evaluates_saves_and_resumes_exactly(
    section: str, name: str, sharding: str, shards: Path, tmp_path: Path
) -> None:
    more = [f"{section}={{{name}: {KEYWORDS.get(name, '{}')}}}", "callbacks.save_weights.interval=1ba"]
    more += ["trainer.parallelism_config=null"] if sharding == "ddp" else []
    undisturbed, _ = run(load_tiny_config("finetune", shards, tmp_path / "a", [*SHORT, *more]))
    config = load_tiny_config("finetune", shards, tmp_path / "b", [*SHORT, *more])
    with pytest.raises(Interrupted):
        run(config, Witness(stop_after=2))
    resumed, _ = run(config)
    assert largest_error(weights_of(resumed), weights_of(undisturbed)) == 0
    assert (tmp_path / "b" / "finetune" / "model" / "config.json").is_file()
