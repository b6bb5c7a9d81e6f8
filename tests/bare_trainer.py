"""A bare Composer Trainer on a model of two layers, and what notes what it does: nothing of this project."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Callback, DataSpec, Event, State
from composer.loggers import Logger, LoggerDestination
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

NUM_SAMPLES, BATCH = 10, 4  # the last batch of an epoch has two


@dataclass
class Row:
    """A batch that is no tensor, no dict and no list."""

    x: Tensor
    weights: Tensor

    def cut(self, starts: list[int]) -> list[Row]:
        pairs = zip([0, *starts], [*starts, len(self.x)], strict=True)
        return [Row(self.x[at:end], self.weights[at:end]) for at, end in pairs]


class Rows(Dataset):
    """Numbered samples, of weight 0, 1, 2, 0, …; notes what a checkpoint asks of it and gives it."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool]] = []
        self.given: list[Any] = []

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[list[float], float]:
        return [index / 10, 1.0], float(index % 3)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        self.asked.append((num_samples, from_beginning))
        return {"samples": num_samples}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        self.given.append(obj)


class Bare(ComposerModel):
    """A weighted mean of squares; its child is the only one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        self.metrics = {"square": MeanMetric()}
        self.forwards: list[tuple[bool, int]] = []

    def forward(self, batch: Row) -> Tensor:
        self.forwards.append((self.training, len(batch.x)))
        return self.model(batch.x)[:, 0].square()

    def loss(self, outputs: Tensor, batch: Row) -> Tensor:
        return (outputs * batch.weights).sum() / (batch.weights.sum() or 1.0)

    def eval_forward(self, batch: Row, outputs: Tensor | None = None) -> Tensor:
        return self(batch)

    def get_metrics(self, is_train: bool = False) -> Any:
        return {} if is_train else self.metrics

    def update_metric(self, batch: Row, outputs: Tensor, metric: Any) -> None:
        metric.update(outputs)


class Notes(Callback):
    """Notes each event with the time, and the batch of some; keeps a number in checkpoints."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.times: list[tuple[str, int, int, int, int, int]] = []
        self.batches: dict[str, list[int]] = {}
        self.gradients: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []
        self.kept = 0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        self.events.append(event.value)
        now = state.timestamp
        counts = (now.batch, now.sample, now.token, now.epoch, now.sample_in_epoch)
        self.times.append((event.value, *(count.value for count in counts)))  # type: ignore[arg-type]
        if event in (Event.BATCH_START, Event.BEFORE_FORWARD, Event.AFTER_LOSS, Event.BATCH_END):
            self.batches.setdefault(event.value, []).append(len(state.batch.x))
        if event == Event.BATCH_START:
            self.rates.append([group["lr"] for group in state.optimizers[0].param_groups])
        if event == Event.AFTER_TRAIN_BATCH:
            named = state.model.named_parameters()
            self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state["kept"]


class Losses(LoggerDestination):
    """What was logged when a logger's own batch_end came."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}
        self.at_batch_end: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.latest.update(metrics)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.at_batch_end.append(dict(self.latest))


class Doubled(Algorithm):
    """Replaces the microbatch by one with twice the values."""

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.batch = replace(state.batch, x=state.batch.x * 2)


def collate(samples: list[tuple[list[float], float]]) -> Row:
    return Row(torch.tensor([x for x, _ in samples]), torch.tensor([weight for _, weight in samples]))


def rows(cuts: list[int], calls: list[Any] | None = None, dataset: Rows | None = None) -> DataSpec:
    """A loader of `Row`s, each cut at these samples."""

    def split(batch: Row, size: int | float) -> list[Row]:
        (calls if calls is not None else []).append((len(batch.x), size))
        return batch.cut([at for at in cuts if at < len(batch.x)])

    return DataSpec(
        DataLoader(dataset or Rows(), batch_size=BATCH, collate_fn=collate),
        split_batch=split,
        microbatch_transforms=lambda batch: replace(batch, x=batch.x + 0),
        get_num_samples_in_batch=lambda batch: len(batch.x),
        get_num_tokens_in_batch=lambda batch: {
            "total": 7 * len(batch.x),
            "loss_generating": float(batch.weights.sum()),
        },
    )


def trainer_of(spec: DataSpec, folder: Path | None = None, **keywords: Any) -> Trainer:
    """A Trainer as this project builds it, with a bare model."""
    model = keywords.pop("model", None) or Bare()
    saved = {} if folder is None else {"save_folder": str(folder), "run_name": "bare", "autoresume": True}
    defaults: dict[str, Any] = {
        "max_duration": "2ep",
        "optimizers": torch.optim.AdamW(model.parameters(), lr=0.1),
        "accumulate_train_batch_on_tokens": True,
        "device_train_microbatch_size": BATCH,
        "device": "cpu",
        "precision": "fp32",
        "progress_bar": False,
        "seed": 5,
    }
    return Trainer(model=model, train_dataloader=spec, **defaults | saved | keywords)
