"""A real training run that is small enough for a test, and a witness that notes what it did."""

from __future__ import annotations

import functools
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination

from composer_path.records import vocabulary

if TYPE_CHECKING:
    from composer import Trainer

# The demo's vocabulary takes a third of a tiny run's CPU time to load; a run changes nothing in it.
load_tokenizer_once = functools.cache(vocabulary.load_tokenizer)
REPO_ROOT = Path(__file__).resolve().parent.parent
VISION_ENCODER = (
    "{name: timm/vit_tiny_patch16_224, image_size: 32, tokens: all, kwargs: {embed_dim: 24, depth: 2, num_heads: 2}}"
)
POOLER = "{kind: reference, dim: 16, num_queries: 4, num_heads: 2}"
LANGUAGE_MODEL = (
    "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, vocab_size: 32000, initializer_range: 0.1}"
)
# Which records: 24 for training (3 steps of 8), 8 held out.
CAPTIONS = range(0, 144, 6)
CONVERSATIONS = (*range(18), 47, 63, 86, 118, 135, 138)  # the last six have no image


# A run of steps only, where nothing else is looked at: no held-out data, no checkpoints.
BARE = ["eval_loader=null", "trainer.save_interval=null", "trainer.autoresume=false"]
TWO_STEPS = [
    *BARE,
    "algorithms=null",  # clipping and AdamW both hide a gradient's scale
    "trainer.max_duration=2ba",
    "scheduler.t_warmup=0dur",  # rounded up, its first step would have rate 0
]


def convert_shards(folder: Path) -> Path:
    """Shards of a few records of test_data, made once for all that ask for this folder."""
    if (folder / "complete").exists():
        return folder
    from composer_path.conversion.convert import convert

    folder.mkdir(parents=True)
    chosen = {
        "captions": ("captions.json", CAPTIONS),
        "train": ("data.json", CONVERSATIONS),
        "text": ("data.json", CONVERSATIONS[-6:]),
        "heldout_captions": ("heldout_captions.json", range(8)),
        "heldout": ("heldout.json", range(8)),
    }
    for name, (file, indices) in chosen.items():
        records = json.loads((REPO_ROOT / "test_data" / file).read_text(encoding="utf-8"))
        data = folder / f"{name}.json"
        data.write_text(json.dumps([records[index] for index in indices]), encoding="utf-8")
        convert(data, REPO_ROOT / "test_data" / "imgs", folder / name)
    (folder / "complete").touch()
    return folder


def tiny_overrides(stage: str, shards: Path, save_root: Path) -> list[str]:
    """What makes a demo YAML tiny, and independent of how the demo is tuned.

    6 steps of 8 samples in two epochs, a 24-wide ViT, a 32-wide LLaMA.
    """
    jitter = ", stain_jitter: {strength: 0.1, shift: 0.01, probability: 0.5}" if stage == "finetune" else ""
    return [
        f"save_root={save_root}",
        f"variables.shards={shards}",
        f"tokenizer.path={REPO_ROOT / 'test_data' / 'tokenizer'}",
        f"model.vision_encoder={VISION_ENCODER}",
        f"model.projector={{pooler: {POOLER}, mlp: {{depth: 2}}}}",
        f"model.language_model={{config: {LANGUAGE_MODEL}}}",
        f"train_loader.dataset.max_seq_len={320 if stage == 'finetune' else 128}",
        "train_loader.dataset={image_position: front, fit: pad, decoder: pil, shuffle: true, num_canonical_nodes: 1}",
        "train_loader.dataset.shuffle_seed=9176",
        "train_loader={global_batch_size: 8, max_tokens_per_microbatch: 700, loss_average: token, num_workers: 0}",
        "eval_loader={global_batch_size: 8, num_workers: 0}",
        "optimizer={lr: 2.0e-3, betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0.0, fused: false}",
        f"scheduler={{t_warmup: {'0.3dur' if stage == 'finetune' else '0dur'}, alpha_f: 0.0}}",
        "algorithms=null",
        f"algorithms={{gradient_clipping: {{clipping_type: norm, clipping_threshold: 1.0}}{jitter}}}",
        "callbacks.speed_report.window_size=2",
        "callbacks.optimizer_monitor.batch_log_interval=1",
        "trainer.parallelism_config.fsdp.reshard_after_forward=true",
        "callbacks.save_weights.interval=1ep",
        "loggers.tensorboard.flush_interval=1",
        "trainer={max_duration: 2ep, eval_interval: 1ep, save_interval: 1ep, save_num_checkpoints_to_keep: 1}",
    ]


def load_tiny_config(stage: str, shards: Path, save_root: Path, more: Iterable[str] = ()) -> Any:
    """A demo YAML, made tiny."""
    from composer_path.config.reading import load_config

    path = REPO_ROOT / "yamls" / "demo" / f"{stage}.yaml"
    return load_config(path, [*tiny_overrides(stage, shards, save_root), *more])


class Interrupted(Exception):
    """A run that was stopped on purpose."""


class Witness(LoggerDestination):
    """Notes losses, the first step's gradients, sample order and metrics; can stop the run.

    Args:
        stop_after: Raise `Interrupted` when so many batches are done (and checkpoints of that moment are written).
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.losses: dict[int, float] = {}
        self.samples: dict[int, list[int]] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.metrics: dict[str, list[float]] = {}
        self.step = 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for key, value in metrics.items():
            if isinstance(value, (int, float, torch.Tensor)):
                self.metrics.setdefault(key, []).append(float(value))
        if "loss/train/total" in metrics:
            self.losses[self.step] = float(metrics["loss/train/total"])

    def batch_start(self, state: State, logger: Logger) -> None:
        self.step = state.timestamp.batch.value
        self.samples[self.step] = sorted(state.batch.sample_ids.tolist())

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if self.step == 0:
            for name, parameter in state.model.named_parameters():
                if parameter.grad is not None:
                    self.gradients[plain_name(name)] = _whole(parameter.grad).clone()

    def notes(self) -> dict[str, Any]:
        """All of it, to be saved."""
        keys = ("losses", "samples", "gradients", "metrics")
        return {key: getattr(self, key) for key in keys}

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        at_epoch_end = state.timestamp.batch_in_epoch.value == state.dataloader_len
        if state.timestamp.batch.value == self.stop_after and not at_epoch_end:
            raise Interrupted

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.stop_after:
            raise Interrupted


def run(config: Any, witness: Witness | None = None) -> tuple[Trainer, Witness]:
    """What `composer train.py` does, watched."""
    from composer_path.train import train

    witness = witness or Witness()
    with mock.patch.object(vocabulary, "load_tokenizer", load_tokenizer_once):
        return train(config, loggers=[witness]), witness


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All parameters as plain tensors by the model's names, also where they are sharded (every rank must call it)."""
    for module in trainer.state.model.modules():
        if hasattr(module, "reshard"):  # after an evaluation FSDP2's root unit still shows its bf16 copies
            module.reshard()
    return {plain_name(name): _whole(parameter).clone() for name, parameter in trainer.state.model.named_parameters()}


def plain_name(name: str) -> str:
    """A parameter's name in PathMLLM, without what DDP, Composer and checkpointing put around it."""
    return name.removeprefix("module.").removeprefix("model.")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def largest_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of the tensors by name, the largest difference of norms relative to the norm."""
    assert ours.keys() == theirs.keys()
    errors = [
        ((ours[k].double() - theirs[k].double()).norm() / theirs[k].double().norm().clamp(min=1e-6)).item()
        for k in ours
    ]
    return max(errors)


def end_group(leader: int, patience: float = 10.0) -> bool:
    """Kill what a command, started in a session of its own, left running; returns whether there was anything.

    Python's own trackers of shared memory outlive a killed process by a moment, in which they clean up after it.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    os.killpg(leader, signal.SIGKILL)
    return True


def road(folder: Path) -> Path:
    """Both stages, run once for all tests of a session that give the same folder.

    Returns:
        A folder with `pretrain`, `finetune`, and for each stage `<stage>.pt`: losses, samples, gradients, metrics and
        the final weights.
    """
    if (folder / "complete").exists():
        return folder
    shards = convert_shards(folder / "shards")
    for stage in ("pretrain", "finetune"):
        trainer, witness = run(load_tiny_config(stage, shards, folder))
        torch.save(witness.notes() | {"weights": weights_of(trainer)}, folder / f"{stage}.pt")
    (folder / "complete").touch()
    return folder


@functools.cache
def two_steps(folder: Path, *overrides: str) -> dict[str, Any]:
    """Two steps of stage 2, run once for all that ask for the same.

    Args:
        folder: Of `road`.
        overrides: Further ones. Without any, each step is one microbatch.

    Returns:
        Losses, samples, gradients, metrics and the final weights.
    """
    more = [f"model.projector.weights={road(folder)}/pretrain/projector.safetensors", *TWO_STEPS, *overrides]
    with tempfile.TemporaryDirectory(dir=folder) as root:
        trainer, witness = run(load_tiny_config("finetune", folder / "shards", Path(root), more))
    return witness.notes() | {"weights": weights_of(trainer)}


SHORT_RUNS = {
    "fsdp2_tied": [
        "model.language_model.config.tie_word_embeddings=true",
    ],
    "ddp": ["trainer.parallelism_config=null"],
}


def short_run(folder: Path, kind: str) -> dict[str, Any]:
    """Two steps of stage 2 whose checkpoints are single files, once undisturbed and once stopped after the first step.

    Args:
        folder: Of `road`.
        kind: One of `SHORT_RUNS`.

    Returns:
        `root`, of the run that was stopped and resumed, and `undisturbed`, `stopped`, `resumed`: what each noted.
    """
    if not (folder / f"{kind}.pt").exists():
        overrides = [
            f"model.projector.weights={road(folder)}/pretrain/projector.safetensors",
            "trainer.max_duration=2ba",
            "trainer.save_interval=1ba",
            "eval_loader=null",
            *SHORT_RUNS[kind],
        ]
        notes: dict[str, Any] = {"root": str(folder / kind)}
        trainer, witness = run(
            load_tiny_config("finetune", folder / "shards", folder / f"{kind}_undisturbed", [*overrides, *BARE])
        )
        notes["undisturbed"] = witness.notes() | {"weights": weights_of(trainer)}
        config = load_tiny_config("finetune", folder / "shards", folder / kind, overrides)
        stopped = Witness(stop_after=1)
        try:
            run(config, stopped)
        except Interrupted:
            notes["stopped"] = stopped.notes()
        trainer, witness = run(config)
        notes["resumed"] = witness.notes() | {"weights": weights_of(trainer)}
        torch.save(notes, folder / f"{kind}.pt")
    return torch.load(folder / f"{kind}.pt")
