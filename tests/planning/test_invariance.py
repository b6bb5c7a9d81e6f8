"""A step that doesn't depend on how it is computed, and faults that make it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import REPO_ROOT, convert_shards, tiny_overrides

from composer_path.cli import main
from composer_path.config.reading import load_config, plain
from composer_path.models.composer_model import ComposerPathMLLM
from composer_path.planning.invariance import Comparison, Row, Way, measure, table, ways_of
from composer_path.planning.one_step import Step

DEMO = str(REPO_ROOT / "yamls" / "demo" / "finetune.yaml")
SINGLE = Way("one sample a microbatch", one_sample=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make the demo tiny; its projector is random."""
    base = tmp_path_factory.getbasetemp()
    shards = convert_shards(base / "road" / "shards")
    return [*tiny_overrides("finetune", shards, base / "never_written"), "model.projector.weights=null"]


@pytest.fixture(scope="module")
def comparison(words: list[str]) -> Comparison:
    """Shared, so that the YAML's own step is computed once."""
    return Comparison(DEMO, words, torch.float32)


def step(**gradients: float) -> Step:
    return Step(10.0, {f"{name}.weight": torch.full((4,), value) for name, value in gradients.items()}, [1, 2], 1)


# --- real steps ------------------------------------------------------------------------------------------------------


def test_single_samples_come_to_what_a_row_of_all_does(comparison: Comparison, words: list[str]) -> None:
    own, row = comparison.row_of(Way("as given")), comparison.row_of(SINGLE)
    assert own.step is not None and own.step.microbatches == 1 and own.step.without_image == 0
    assert row.step is not None and row.step.microbatches == 8 and row.step.without_image == 1
    assert set(row.differences) == {"loss", "projector", "language_model"}
    assert row.worst < 1e-6  # measured 4e-8, in fp64; 4e-6 in fp32
    text, holds = table([own, row], torch.float32)
    assert holds and "within 1e-06" in text
    assert ("the same in fp64" in text) == bool(row.in_fp64)  # where fp32 alone is beyond it, as on some CPUs
    save_root = next(word.split("=")[1] for word in words if word.startswith("save_root="))
    assert not Path(save_root).exists()


def test_a_step_that_depends_on_the_split_is_beyond_the_limit_in_fp64_too(
    comparison: Comparison, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ComposerPathMLLM.loss

    def wrong(self: ComposerPathMLLM, outputs: Any, batch: Any) -> Any:
        return right(self, outputs, batch) * (1.001 if len(batch.sample_ids) == 1 else 1.0)

    monkeypatch.setattr(ComposerPathMLLM, "loss", wrong)
    row = comparison.row_of(SINGLE)
    assert row.in_fp64["language_model"] == pytest.approx(1e-3, rel=1e-3)
    text, holds = table([comparison.row_of(Way("as given")), row], torch.float32)
    assert not holds and "worst: 1.0e-03 (one sample a microbatch), beyond 1e-06" in text


def test_what_a_machine_does_not_know_is_left_out_and_other_samples_are_a_difference(comparison: Comparison) -> None:
    unknown = comparison.row_of(Way("liger", ("execution.fusion=liger",)))
    assert unknown.why.startswith("left out: execution.fusion: ") and unknown.worst == 0
    other = comparison.row_of(Way("other seed", ("train_loader.dataset.shuffle_seed=3",)))
    text, holds = table([comparison.row_of(Way("as given")), unknown, other], torch.float32)
    assert not holds and "found other samples than the YAML's step" in text


def test_a_mistake_of_the_yaml_itself_is_no_row(words: list[str]) -> None:
    broken = Comparison(DEMO, [*words, "model.projector.weights=/nowhere.safetensors"], torch.float32)
    with pytest.raises((ValueError, OSError)):
        broken.row_of(SINGLE)


@pytest.mark.slow
def test_ranks_share_the_same_step(comparison: Comparison) -> None:
    row = comparison.row_of(Way("2 ranks", ranks=2))
    assert row.step is not None and row.step.microbatches == 2
    assert largest_of(row) < 1e-6  # measured 2e-7


def largest_of(row: Row) -> float:
    assert not row.why
    return max(row.differences.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_all_ways_of_both_stages_are_within_the_limit(
    stage: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = next(word.split("=")[1] for word in words if word.startswith("variables.shards="))
    given = [*tiny_overrides(stage, Path(shards), tmp_path), "model.projector.weights=null"]
    code = main(["check", str(REPO_ROOT / "yamls" / "demo" / f"{stage}.yaml"), *given, "--invariance", "--ranks", "2"])
    output = capsys.readouterr().out
    assert code == 0 and "within 1e-06" in output and "2 ranks, DDP" in output and "left out" not in output


# --- ways and tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "float8", "encoder"])
def test_each_way_changes_one_thing_and_is_a_configuration(
    kind: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    more = {
        "fsdp": [],
        "ddp": ["trainer.parallelism_config=null"],
        "float8": ["trainer.parallelism_config=null", "model.trainable=[projector]", "execution.frozen_weights=float8"],
        "encoder": ["model.trainable=[projector, language_model, vision_encoder]", "execution.vision_chunk=null"],
    }[kind]
    settings = plain(load_config(DEMO, [*words, *more]))
    ways = list(ways_of(settings, 4))
    assert ways[0] == Way("as given")
    assert len({way.what for way in ways}) == len({(way.words, way.one_sample, way.ranks) for way in ways}) == len(ways)
    refused = []
    for way in ways[1:]:
        try:
            changed = plain(load_config(DEMO, [*words, *more, *way.words]))
        except ValueError:
            refused.append(way.what)
            continue
        assert changed != settings or way.one_sample or way.ranks > 1, way
    assert refused == (["FSDP2", "4 ranks, FSDP2", "4 ranks, 2 replicas (HSDP)"] if kind == "float8" else [])
    assert any(way.what == "4 ranks, 2 replicas (HSDP)" for way in ways)


def test_a_yaml_for_replicas_is_compared_on_one_rank(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    seen: list[Any] = []

    def load(self: Comparison, way: Way) -> Row:
        monkeypatch.setenv("WORLD_SIZE", "1")
        seen.append(load_config(self.yaml, [*self.words, *way.words]).trainer.parallelism_config)
        return Row(way)

    monkeypatch.setattr(Comparison, "row_of", load)
    replicas = "trainer.parallelism_config.fsdp.data_parallel_replicate_degree=8"
    measure(DEMO, [*words, replicas], 1, lambda way: None)
    assert seen[0].fsdp.data_parallel_replicate_degree is None and None in seen


def test_differences_are_relative_and_a_missing_gradient_is_infinite() -> None:
    own = step(projector=1.0, language_model=2.0)
    assert own.norms() == {"projector": 2.0, "language_model": 4.0}
    assert step(projector=1.5, language_model=2.0).norms(own) == {"projector": 1.0, "language_model": 0.0}
    assert math.isnan(step(vision_encoder=1.0).norms(own)["vision_encoder"])


@pytest.mark.parametrize("value", [math.nan, math.inf, 2e-6])
def test_what_is_not_within_the_limit_is_beyond_it(value: float) -> None:
    own = Row(Way("as given"), step(projector=1.0))
    other = Row(Way("other"), step(projector=1.0), {"loss": 0.0, "projector": value})
    assert not table([own, other], torch.float32)[1]
    assert table([own], torch.float32)[1]


def test_ways_that_were_left_out_are_counted_in_the_verdict() -> None:
    own = Row(Way("as given"), step(projector=1.0))
    text, _ = table([own, Row(Way("2 ranks"), why="left out: 2 ranks ended early")], torch.float32)
    assert text.endswith("1 of 2 ways left out") and "left out" not in table([own], torch.float32)[0]


def test_bf16_has_a_limit_of_its_own_and_says_so() -> None:
    own = Row(Way("as given"), step(projector=1.0))
    text, holds = table([own, Row(Way("other"), own.step, {"loss": 1e-3, "projector": 1e-2})], torch.bfloat16)
    assert holds and "within 5e-02" in text and "bf16, which rounds; trainer.precision=fp32" in text


WRONG = {
    "ranks_alone": (["--ranks", "2"], {}, "--ranks: says how many share a step; give it with --invariance"),
    "ranks": (["--invariance", "--ranks", "3"], {}, "--ranks: found 3, which doesn't divide global_batch_size 8"),
    "launched": (["--invariance"], {"WORLD_SIZE": "2"}, "leave the launcher out, and give --ranks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_compared_is_said_in_one_line(
    case: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more, environment, message = WRONG[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = main(["check", DEMO, *words, *more])
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
