"""Several evaluations by names of one's own; the best checkpoint and the summary follow them; what loggers are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from composer.loggers import LoggerDestination
from config_problems import problems_of
from omegaconf import OmegaConf
from tiny_run import REPO_ROOT, convert_shards, load_tiny_config

from composer_path.run.told_settings import AT_ONCE, settings_told
from composer_path.train import train

PRETRAIN = REPO_ROOT / "yamls" / "demo" / "pretrain.yaml"
OTHER = (
    "eval_loaders={captions: {dataset: {local: %s, template: plain, max_seq_len: 128}, global_batch_size: 8, "
    "num_workers: 0, max_tokens_per_microbatch: 700}}"
)


class Told(LoggerDestination):
    """What a logger is told, and what it refuses."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.parts: list[dict[str, Any]] = []
        self.metrics: dict[str, list[float]] = {}

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self.refuse and "version" in hyperparameters:
            raise RuntimeError("secret")
        self.parts.append(hyperparameters)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name in metrics:
            self.metrics.setdefault(name, []).append(float(metrics[name]))


def test_each_evaluation_has_its_name_and_the_best_checkpoint_follows_the_one_that_is_named(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    shards = convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")
    more = [OTHER % (shards / "captions"), "trainer.best=captions/token_loss", "trainer.max_duration=2ba"]
    config = load_tiny_config("pretrain", shards, tmp_path, [*more, "trainer.eval_interval=1ba"])
    told, refusing = Told(), Told(refuse=True)
    train(config, loggers=[told, refusing])

    captions, heldout = (told.metrics[f"metrics/{name}/token_loss"] for name in ("captions", "heldout"))
    assert len(captions) == len(heldout) == 3 and captions[0] != heldout[0]
    summary = json.loads((tmp_path / "pretrain" / "summary.json").read_text())
    assert summary["eval_token_loss"]["captions"] == {"before": captions[0], "after": captions[-1]}
    assert summary["heldout_token_loss"] == {"before": heldout[0], "after": heldout[-1]}
    best = tmp_path / "pretrain" / "checkpoints" / "best"
    manifest = next(path for path in best.iterdir() if "manifest" in path.name)
    assert f"{min(captions[1:])}" in manifest.read_text()

    seen = {key: value for part in told.parts for key, value in part.items()}
    assert max(map(len, told.parts)) <= AT_ONCE < len(seen)
    assert seen["trainer.max_duration"] == "2ba" and seen["train_loader.dataset.max_seq_len"] == 128
    assert "took not all settings (RuntimeError)" in caplog.text and "secret" not in caplog.text


def test_values_of_environment_variables_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_KEY", "s3cret")
    config = OmegaConf.create(
        {"a": {"key": "${oc.env:OWN_KEY}", "copy": "${.key}"}, "list": ["x${oc.env:OWN_KEY}"], "n": 3, "m": "${n}"}
    )
    told = settings_told(config)
    assert (
        "s3cret" not in str(told) and told["m"] == 3 and "OWN_KEY" in told["a.copy"] and "OWN_KEY" in str(told["list"])
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["trainer.best=heldot/token_loss"],
            "trainer.best: found 'heldot/token_loss'; did you mean heldout/token_loss?",
        ),
        (["trainer.best=a/b/c"], "trainer.best: found 'a/b/c'; there are heldout/token_loss"),
        ([OTHER.replace("captions", "heldout") % "x"], "eval_loaders: found the name 'heldout'; it must be letters"),
        ([OTHER.replace("captions", "train") % "x"], "eval_loaders: found the name 'train'; it must be letters"),
        ([OTHER.replace("captions", "'a/b'") % "x"], "eval_loaders: found the name 'a/b'; it must be letters"),
        (
            [(OTHER % "x").replace("num_workers", "num_worker")],
            "eval_loaders.captions.num_worker: unknown key; did you",
        ),
        (["eval_metrics.token_loss={}"], "eval_metrics.token_loss: is not set here; leave it out"),
        (["eval_metrics.accuracy={}"], "eval_metrics.accuracy: unknown key; it takes no keywords"),
    ],
)
def test_a_mistake_about_evaluations_is_named(words: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO_ROOT)
    assert any(problem.startswith(line) for problem in problems_of(PRETRAIN, *words)), problems_of(PRETRAIN, *words)
