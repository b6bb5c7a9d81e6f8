"""One training run for the GPU benchmark, in a process of its own: `python -m benchmarks.gpu_run JSON`.

`ours` is the product's YAML through `composer_path.train.train`. `padded` is the same road with the reference's way
inside: samples padded to the longest, logits everywhere. `transformers` is transformers' Trainer over our rows, as
peers run padding-free batches: bf16 weights with bf16 moments, recomputed layers, Liger's kernels where there is a GPU.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.gpu_ceilings import wait_for_device
from composer_path import ComposerPathMLLM, PathMLLM
from composer_path.batches.batch import Batch
from composer_path.config.reading import load_config, plain
from composer_path.models.flops import FlopCounter
from composer_path.records.tokenize import IGNORE_INDEX
from composer_path.records.vocabulary import load_tokenizer
from composer_path.train import build_loader, build_model


class StepClock(Callback):
    """Notes when steps end, their losses, samples, tokens and needed operations."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.done: list[tuple[int, int, float]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        """Composer ended a step."""
        model: Any = state.model
        adapter: ComposerPathMLLM = getattr(model, "module", model)
        self.note(float(state.total_loss_dict["loss/train/total"]), adapter.flops, state.batch)  # type: ignore[arg-type]

    def note(self, loss: float, flops: FlopCounter, batch: Batch) -> None:
        """A step ended."""
        wait_for_device()
        self.losses.append(loss)
        self.ends.append(time.perf_counter())
        sizes = batch.sizes()
        self.done.append((len(sizes[0]), sum(sizes[0]), flops.needed(*sizes).total))

    def report(self, skip: int) -> dict[str, Any]:
        """Rates of all steps but the first ones."""
        elapsed = self.ends[-1] - self.ends[skip - 1]
        samples, tokens, needed = (sum(values) for values in zip(*self.done[skip:], strict=True))
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
        return {
            "samples_per_s": samples / elapsed,
            "tokens_per_s": tokens / elapsed,
            "needed_tflops": needed / elapsed / 1e12,
            "peak_memory_gb": peak,
            "losses": self.losses,
            "steps": len(self.losses) - skip,
        }


def run_road(config: Any, skip: int, padded: bool) -> dict[str, Any]:
    """`composer_path.train.train`, watched; padded on request."""
    from composer_path.train import train

    clock = StepClock()
    if padded:
        PathMLLM.forward = padded_forward  # type: ignore[method-assign, assignment]
    train(config, callbacks=[clock])
    return clock.report(skip)


def padded_forward(
    self: PathMLLM,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seq_lens: Tensor,
    max_seq_len: int,
    pixel_values: Tensor,
    image_index: Tensor,
    logits_index: Tensor,
    targets: Tensor,
    **ignored: Any,
) -> Tensor:
    """The same losses from a rectangle: padding at the right needs no mask under causal attention."""
    lengths = torch.diff(cu_seq_lens).tolist()
    row = self.embed_tokens(input_ids, self.embed_images(pixel_values), image_index)
    labels = torch.full_like(input_ids, IGNORE_INDEX).index_copy(0, logits_index, targets)
    embeds = pad_sequence(row.split(lengths), batch_first=True)
    padded_labels = pad_sequence(labels.split(lengths), batch_first=True, padding_value=IGNORE_INDEX)
    logits = self.language_model(inputs_embeds=embeds, use_cache=False).logits
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), padded_labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses[padded_labels.flatten() != IGNORE_INDEX]


class RowModel(nn.Module):
    """What transformers' Trainer gets: a row in, the mean loss over its answer tokens out."""

    def __init__(self, model: PathMLLM, fused_loss: bool) -> None:
        super().__init__()
        self.model = model
        self.fused_loss = fused_loss

    def forward(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """Liger's model computes the loss itself; without it, ours does."""
        model = self.model
        if not self.fused_loss:
            keys = ("input_ids", "position_ids", "cu_seq_lens", "max_seq_len", "pixel_values", "image_index", "targets")
            losses = model(**{key: row[key] for key in keys}, logits_index=row["supervised_index"])
            return {"loss": losses.mean()}
        embeds = model.embed_tokens(row["input_ids"], model.embed_images(row["pixel_values"]), row["image_index"])
        output: Any = model.language_model(
            inputs_embeds=embeds[None],
            position_ids=row["position_ids"][None],
            use_cache=False,
            labels=row["labels"][None],
            shift_labels=row["labels"][None],
            cu_seq_lens_q=row["cu_seq_lens"],
            cu_seq_lens_k=row["cu_seq_lens"],
            max_length_q=row["max_seq_len"],
            max_length_k=row["max_seq_len"],
        )
        return {"loss": output.loss}


def run_transformers(config: Any, skip: int, folder: Path) -> dict[str, Any]:
    """Transformers' Trainer over our loader's rows, one row a step."""
    from transformers import Trainer, TrainingArguments

    settings = plain(config)
    steps = int(settings["trainer"]["max_duration"].removesuffix("ba"))
    fused = torch.cuda.is_available()
    model = build_model(plain(config))
    flops = FlopCounter(model)
    for parameter in model.language_model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    if fused:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True, model=model.language_model
        )
    model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer = load_tokenizer(**settings["tokenizer"])
    spec = build_loader(settings["train_loader"] | {"max_tokens_per_microbatch": None}, model, tokenizer)
    clock, rows = StepClock(), list(spec.dataloader)
    trainer_class: Any = Trainer

    class RowTrainer(trainer_class):
        """Our rows in their order; each step is noted."""

        def get_train_dataloader(self) -> Any:
            return [{"row": vars(row)} for row in rows]

        def training_step(self, *args: Any, **keywords: Any) -> Tensor:
            loss = super().training_step(*args, **keywords)
            self.last_loss = loss.detach()
            return loss

        def _prepare_input(self, data: Any) -> Any:
            return (
                {key: self._prepare_input(value) for key, value in data.items()}
                if isinstance(data, dict)
                else (data.to(self.args.device) if isinstance(data, Tensor) else data)
            )

    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Tells our clock."""

        def on_step_end(self, *args: Any, **keywords: Any) -> None:
            clock.note(float(trainer.last_loss), flops, rows[len(clock.losses) % len(rows)])

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
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
    trainer = RowTrainer(model=RowModel(model, fused), args=arguments, callbacks=[Clock()], train_dataset=rows)
    trainer.train()
    return clock.report(skip)


def main() -> int:
    """Run what the JSON says and print its report as the last line."""
    plan = json.loads(sys.argv[1])
    config = load_config(plan["yaml"], plan["overrides"])
    torch.manual_seed(17)
    if plan["variant"] == "transformers":
        report = run_transformers(config, plan["skip"], Path(plan["folder"]))
    else:
        report = run_road(config, plan["skip"], padded=plan["variant"] == "padded")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
