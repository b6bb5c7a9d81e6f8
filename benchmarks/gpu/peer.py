"""Transformers' Trainer over our rows, as peers run padding-free batches: bf16 weights and moments, Liger's kernels."""

from __future__ import annotations

from dataclasses import fields
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.gpu.clock import Clock
from composer_path import PathMLLM
from composer_path.batches.batch import Batch
from composer_path.config.reading import load_config, plain
from composer_path.models.flops import FlopCounter
from composer_path.models.parameters import cast_parameters
from composer_path.records.tokenize import IGNORE_INDEX
from composer_path.records.vocabulary import load_tokenizer
from composer_path.train import build_loader, build_model

_Trainer: Any = Trainer  # a type checker can't follow how it is assembled


class RowModel(nn.Module):
    """What the Trainer gets: a row in, the mean loss over its answer tokens out.

    Args:
        model: Of which the language model may have Liger's layers.
        fused_loss: Whether Liger computes head and loss together, at every position.
    """

    def __init__(self, model: PathMLLM, fused_loss: bool) -> None:
        super().__init__()
        self.model = model
        self.fused_loss = None
        if fused_loss:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            self.fused_loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)

    def forward(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch's fields."""
        model = self.model
        if self.fused_loss is None:
            keys = ("input_ids", "position_ids", "cu_seq_lens", "max_seq_len", "pixel_values", "image_index", "targets")
            losses = model(**{key: row[key] for key in keys}, logits_index=row["supervised_index"])
            return {"loss": losses.mean()}
        embeds = model.embed_tokens(row["input_ids"], model.embed_images(row["pixel_values"]), row["image_index"])
        hidden = model.language_model.base_model(
            inputs_embeds=embeds[None],
            position_ids=row["position_ids"][None],
            use_cache=False,
            cu_seq_lens_q=row["cu_seq_lens"],
            cu_seq_lens_k=row["cu_seq_lens"],
            max_length_q=row["max_seq_len"],
            max_length_k=row["max_seq_len"],
        ).last_hidden_state[0]
        head: Any = model.language_model.get_output_embeddings()
        return {"loss": self.fused_loss(head.weight, hidden, row["labels"])}


class RowTrainer(_Trainer):
    """Our rows in their order, one a step."""

    def __init__(self, rows: list[Batch], steps: int, **keywords: Any) -> None:
        super().__init__(train_dataset=rows, **keywords)  # type: ignore[call-arg]
        self.rows = list(islice(cycle(rows), steps))
        self.last_loss: Tensor | None = None

    def get_train_dataloader(self) -> Any:
        """Rows as mappings, which the Trainer moves to the device."""
        return [{"row": {column.name: getattr(row, column.name) for column in fields(row)}} for row in self.rows]

    def training_step(self, *args: Any, **keywords: Any) -> Tensor:
        """A step, whose loss is kept."""
        loss: Tensor = super().training_step(*args, **keywords)
        self.last_loss = loss.detach()
        return loss

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: self._prepare_input(value) for key, value in data.items()}
        return data.to(self.args.device, non_blocking=True) if isinstance(data, Tensor) else data


class TrainerWatch(TrainerCallback):
    """Tells the clock what the Trainer does."""

    def __init__(self, clock: Clock, model: PathMLLM, flops: FlopCounter) -> None:
        self.clock, self.model, self.flops = clock, model, flops
        self.trainer: RowTrainer | None = None

    def on_pre_optimizer_step(self, *args: Any, **keywords: Any) -> None:
        """Gradients are there."""
        self.clock.note_gradients(self.model)

    def on_step_end(self, *args: Any, **keywords: Any) -> None:
        """A step has ended."""
        assert self.trainer is not None
        self.clock.note(self.trainer.last_loss, self.flops, self.trainer.rows[len(self.clock.losses)])


def run(task: dict[str, Any]) -> dict[str, Any]:
    """A training run.

    Args:
        task: `yaml`, `overrides`, `steps`, `skip`, `recomputes`, `folder`.
    """
    settings = plain(load_config(Path(task["yaml"]), task["overrides"]))
    fused = torch.cuda.is_available()
    torch.manual_seed(17)
    torch.set_float32_matmul_precision("high")  # as on our road
    model = build_model(settings)
    flops = FlopCounter(model)
    cast_parameters(model.language_model, torch.bfloat16)
    if fused:
        use_liger(model)
    if task["recomputes"]:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    spec = build_loader(
        settings["train_loader"] | {"max_tokens_per_microbatch": None}, model, load_tokenizer(**settings["tokenizer"])
    )
    clock = Clock(task["steps"], task["skip"])
    watch = TrainerWatch(clock, model, flops)
    arguments = TrainingArguments(
        output_dir=task["folder"],
        max_steps=task["steps"],
        per_device_train_batch_size=1,
        learning_rate=settings["optimizer"]["lr"],
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch_fused" if fused else "adamw_torch",
        bf16=fused,
        report_to=[],
        save_strategy="no",
        use_cpu=not fused,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_steps=10**9,
    )
    model.train()
    rows: list[Any] = list(spec.dataloader)
    if fused:
        rows = [row.pin_memory() for row in rows]
    trainer = RowTrainer(rows, task["steps"], model=RowModel(model, fused), args=arguments, callbacks=[watch])
    watch.trainer = trainer
    trainer.train()
    return clock.report() | {"liger": fused, "recomputes": task["recomputes"]}


def use_liger(model: PathMLLM) -> None:
    """Liger's layers in the language model; its loss is `RowModel`'s."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False, model=model.language_model
    )
