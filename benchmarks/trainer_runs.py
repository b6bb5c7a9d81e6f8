"""Whole training runs on the same weights, records and order: our road, and transformers' Trainer.

Each is run in a process of its own and reports the CPU time between the end of its first and of its last step, so that
neither start nor checkpoints count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor

from benchmarks.instruction_set import IMAGES, REPOSITORY, InstructionSet
from benchmarks.lazy_conversations import LazyConversations
from benchmarks.padded_step import PaddedModel, pad_samples
from composer_path.config.reading import load_config, plain
from composer_path.train import build_model

# About the proportions of a 7B, a quarter of the lengths.
SMALL = {
    "model.vision_encoder": "{image_size: 112, kwargs: {embed_dim: 64, depth: 2, num_heads: 1}}",
    "model.projector.pooler": "{kind: reference, dim: 96, num_queries: 32, num_heads: 8}",
    "model.language_model.config": "{model_type: llama, hidden_size: 384, intermediate_size: 1032, "
    "num_hidden_layers: 4, num_attention_heads: 6, num_key_value_heads: 6, vocab_size: 512}",
}
NEARLY_EMPTY = {
    "model.vision_encoder": "{image_size: 32, kwargs: {embed_dim: 24, depth: 1, num_heads: 2}}",
    "model.projector.pooler": "{kind: reference, dim: 16, num_queries: 4, num_heads: 2}",
    "model.language_model.config": "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 512}",
    "trainer.parallelism_config": "null",  # as transformers' run: a process group's threads are not the Trainer's work
}
MODELS = {"small": SMALL, "nearly empty": NEARLY_EMPTY}


def run_config(data: InstructionSet, model: str, steps: int, folder: Path, batch_size: int = 8) -> Any:
    """The demo's stage 2 with another model and set; the order is the file's, no augmentation, a constant rate."""
    overrides = [
        f"save_root={folder}",
        f"tokenizer.path={data.tokenizer}",
        "model.projector.weights=null",
        "model.language_model=null",  # drop the demo's
        *(f"{key}={value}" for key, value in MODELS[model].items()),
        f"train_loader.dataset={{local: {data.shards}, shuffle: false, max_seq_len: 2048}}",
        "train_loader.dataset.template={name: llava_llama_2, system: null}",
        f"train_loader={{global_batch_size: {batch_size}, max_tokens_per_microbatch: 4096}}",
        "eval_loader=null",
        "algorithms=null",
        "algorithms={gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}}",
        "scheduler=null",
        "scheduler={name: constant}",
        "callbacks=null",
        "callbacks={speed_report: {window_size: 5}, lr_monitor: {}, batch_report: {}}",
        f"trainer={{max_duration: {steps}ba, eval_interval: 1ep, save_interval: 999ep, autoresume: false}}",
    ]
    return load_config(REPOSITORY / "yamls" / "demo" / "finetune.yaml", overrides)


class StepClock(Callback):
    """Notes loss and time at the end of each step, by default the process's CPU time."""

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self.now = now
        self.ends: list[float] = []
        self.losses: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        """A step has ended."""
        total: Any = state.total_loss_dict["loss/train/total"]
        self.note(float(total))

    def note(self, loss: float) -> None:
        """A step has ended with this loss."""
        self.losses.append(loss)
        self.ends.append(self.now())

    def report(self) -> dict[str, Any]:
        """Losses, and the mean and median time of all steps but the first."""
        steps = [end - start for start, end in pairwise(self.ends)]
        seconds = {"seconds_per_step": statistics.fmean(steps), "median_seconds_per_step": statistics.median(steps)}
        return {"losses": self.losses, **seconds}


def run_ours(config: Any, now: Callable[[], float] = time.process_time) -> dict[str, Any]:
    """The real road: shards, `composer_path.train.train`, Composer's Trainer."""
    from composer_path.train import train

    clock = StepClock(now)
    train(config, callbacks=[clock])
    return clock.report()


def finish_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip, step, forget."""
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def lazy_dataset(config: Any, data: Path, images: Path = IMAGES) -> LazyConversations:
    """The records of a JSON file for the padded runs, prepared as the configuration's loader prepares its shards."""
    from transformers import LlamaTokenizer

    from composer_path.records.prompts import get_template

    settings = plain(config)
    dataset, model = settings["train_loader"]["dataset"], build_model(plain(config))
    template: Any = get_template(dataset["template"])
    return LazyConversations(
        data,
        images,
        LlamaTokenizer.from_pretrained(settings["tokenizer"]["path"], legacy=True),
        num_image_tokens=model.num_image_tokens(),
        image_size=model.vision_encoder.image_size,
        mean=model.vision_encoder.mean,
        std=model.vision_encoder.std,
        system=template.system,
        max_seq_len=dataset["max_seq_len"],
    )


def run_transformers(
    config: Any, data: Path, checkpointing: bool, folder: Path, now: Callable[[], float] = time.process_time
) -> dict[str, Any]:
    """Transformers' Trainer with a padded collator over the lazy set."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    settings = plain(config)
    steps = int(settings["trainer"]["max_duration"].removesuffix("ba"))
    clock, losses = StepClock(now), []
    trainer_class: Any = Trainer  # a type checker can't follow how it is assembled

    class InOrder(trainer_class):
        """In the file's order, with each step's loss in full precision."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(
                train_dataset if train_dataset is not None else self.train_dataset
            )

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
            loss: Tensor = model(**inputs)["loss"]
            losses.append(loss.item())
            return loss

    class Clock(TrainerCallback):
        """Tells our clock."""

        def on_step_end(self, *args: Any, **keywords: Any) -> None:
            clock.note(losses[-1])

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings["train_loader"]["global_batch_size"],
        max_steps=steps,
        learning_rate=settings["optimizer"]["lr"],
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        report_to=["tensorboard"],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    padded = PaddedModel(build_model(plain(config)), checkpointing)
    trainer = InOrder(
        model=padded,
        args=arguments,
        train_dataset=lazy_dataset(config, data),
        data_collator=pad_samples,
        callbacks=[Clock()],
    )
    trainer.train()
    return clock.report()


def run_by_name(
    name: str, config: Any, data: Path, folder: Path, now: Callable[[], float] = time.process_time
) -> dict[str, Any]:
    """`ours`, `transformers`, or `transformers, checkpointing`."""
    if name == "ours":
        return run_ours(config, now)
    return run_transformers(config, data, "checkpointing" in name, folder, now)
