"""Claims about what a training step asks of the device: microbatches are cut on the CPU, and nothing waits."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor
from composer.core import Callback, DataSpec, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.optim import ConstantScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

import composer_path.run.trainer
from composer_path import IGNORE_INDEX, IMAGE_TOKEN_ID
from composer_path.batches.batch import Batch, PackedCollator, Sample, split_batch
from composer_path.callbacks import BatchReport, SpeedReport, StepLine
from composer_path.callbacks.tensorboard import TensorboardLogger
from composer_path.models.composer_model import ComposerPathMLLM
from composer_path.run.late_losses import LateLosses
from composer_path.run.trainer import StepTrainer
from composer_path.weights.assembly import assemble_model

NUM_IMAGE_TOKENS = 4


def samples(count: int = 6, seed: int = 0) -> list[Sample]:
    """With no image, one or two."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        images, answer = index % 3, draw.randint(2, 9)
        placeholders = torch.full((NUM_IMAGE_TOKENS * images,), IMAGE_TOKEN_ID)
        input_ids = torch.cat([placeholders, torch.arange(5 + draw.randint(1, 30) + answer) % 64])
        made.append(
            Sample(
                sample_id=index,
                input_ids=input_ids,
                labels=torch.where(torch.arange(len(input_ids)) < len(input_ids) - answer, IGNORE_INDEX, input_ids),
                pixel_values=torch.zeros((images, 3, 32, 32), dtype=torch.uint8),
                is_he=torch.zeros(images, dtype=torch.bool),
                source="all",
                problem=None,
            )
        )
    return made


# ------------------------------------------------------------------------------------------------ Composer's order


class Line(ComposerModel):
    """The least that Composer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.layer(batch.input_ids.float()[:, None]).sum()

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return outputs


class Watched(DeviceCPU):
    """Notes when a batch is moved, and to which samples it belongs."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def batch_to_device(self, batch: Any) -> Any:
        self.events.append(batch.sample_ids.tolist())
        return super().batch_to_device(batch)


def test_composer_cuts_a_batch_before_it_moves_it_and_moves_each_microbatch_when_its_turn_has_come() -> None:
    events: list[Any] = []

    def split(batch: Batch, size: int | float) -> list[Batch]:
        events.append("split")
        return split_batch(batch, size)

    loader = DataLoader([*samples()], batch_size=6, collate_fn=PackedCollator(100))  # type: ignore[arg-type]
    spec = DataSpec(
        loader,
        split_batch=split,
        get_num_samples_in_batch=lambda batch: len(batch.sample_ids),
        get_num_tokens_in_batch=lambda batch: {
            "total": len(batch.input_ids),
            "loss_generating": len(batch.targets),
        },
    )
    (batch,) = loader
    expected = [part.sample_ids.tolist() for part in split_batch(batch, 6)]
    assert len(expected) > 1
    model = Line()
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        max_duration="1ba",
        device=Watched(events),
        optimizers=torch.optim.SGD(model.parameters()),
        accumulate_train_batch_on_tokens=True,
        device_train_microbatch_size=6,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    assert events == ["split", *expected]


def test_evaluation_cuts_before_it_moves_too() -> None:
    events: list[Any] = []

    def split(batch: Batch, size: int | float) -> list[Batch]:
        events.append("split")
        return split_batch(batch, size)

    loader = DataLoader([*samples()], batch_size=6, collate_fn=PackedCollator(100))  # type: ignore[arg-type]
    spec = DataSpec(
        loader,
        split_batch=split,
        get_num_samples_in_batch=lambda batch: len(batch.sample_ids),
        get_num_tokens_in_batch=lambda batch: len(batch.input_ids),
    )
    model = Watching()
    optimizer = torch.optim.SGD(model.parameters())
    trainer = Trainer(model=model, optimizers=optimizer, device=Watched(events), progress_bar=False)
    trainer.eval(spec)
    trainer.close()
    assert events[0] == "split" and len(events) > 2


class Watching(Line):
    """With what an evaluation asks for."""

    def eval_forward(self, batch: Batch, outputs: Any = None) -> torch.Tensor:
        return self(batch)


# ------------------------------------------------------------------------------------------------ nothing waits


class Reads(TorchDispatchMode):
    """Counts operations that hand a device's content to Python."""

    READING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal", "_to_copy")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        leaves = any(tensor.is_meta for tensor in tensors)
        to_cpu = name == "_to_copy" and torch.device((kwargs or {}).get("device") or "meta").type == "cpu"
        if leaves and name in self.READING and (name != "_to_copy" or to_cpu):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_counter_counts() -> None:
    with Reads() as reads:
        for read in (torch.Tensor.item, torch.Tensor.nonzero, torch.Tensor.cpu):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read(torch.ones(1, device="meta"))
    assert len(reads.found) == 3


@pytest.fixture(scope="module")
def model() -> Iterator[ComposerPathMLLM]:
    """A tiny model in half precision on a device that can't be read, with the attention of a GPU."""
    model = assemble_model(
        vision_encoder={
            "name": "timm/vit_tiny_patch16_224",
            "image_size": 32,
            "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        projector={"pooler": {"dim": 16, "num_queries": NUM_IMAGE_TOKENS, "num_heads": 2}, "mlp": {"depth": 1}},
        language_model={
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 64,
            }
        },
        trainable=["projector", "language_model"],
    )
    yield ComposerPathMLLM(model.to(torch.bfloat16).to("meta"))


def test_a_step_asks_the_device_for_nothing(model: ComposerPathMLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, loss and backward of every microbatch, one of them without an image."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from composer_path.models.attention import packed_attention

    # This device knows no autocast, which is off here.
    monkeypatch.setattr(torch, "autocast", lambda **keywords: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device_type: False)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "packed_sdpa", partial(packed_attention, "torch_flash"))
    parts = split_batch(PackedCollator(70)(samples(9)), 3)
    assert len(parts) >= 3
    parts.append(PackedCollator()(samples(1)))
    assert len(parts[-1].pixel_values) == 0
    with Reads() as reads:
        for part in parts:
            batch = part.to("meta")  # which can't be read: whatever asked it for a number would fail
            loss = model.loss(model(batch), batch)
            assert loss.is_meta
            loss.backward()
    assert reads.found == []
    assert all(parameter.grad is not None for parameter in model.model.projector.parameters())


class Far(DeviceCPU):
    """A device whose tensors can't be read, once it has been left."""

    left = False

    def module_to_device(self, module: Any) -> Any:
        return module

    def tensor_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta") if self.left else tensor


class Leaving(Callback):
    """Leaves the device's content behind when the run begins, and notes which steps have ended."""

    def __init__(self, device: Far) -> None:
        self.device, self.step = device, 0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.device.left = True

    def batch_end(self, state: State, logger: Logger) -> None:
        self.step = state.timestamp.batch.value


def test_a_whole_step_with_its_callbacks_and_loggers_asks_the_device_for_nothing_before_the_next_has_begun(
    model: ComposerPathMLLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Composer's loop, clipping, optimizer and schedule; only losses are read, each a step late."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a check of types reads what it checks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from composer_path.models.attention import packed_attention

    monkeypatch.setattr(torch, "autocast", lambda **keywords: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device_type: False)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "packed_sdpa", partial(packed_attention, "torch_flash"))
    device = Far()
    leaving, asked = Leaving(device), []

    class Late(LateLosses):
        """Losses that come when the next step has ended."""

        def __init__(self, sums: Any, world_size: int) -> None:
            super().__init__(sums, world_size)
            assert self.host.is_meta
            self.step = leaving.step + 1

        def arrived(self) -> bool:
            return leaving.step > self.step

        def __getitem__(self, name: str) -> float:
            asked.append((self.step, leaving.step))
            return float(self.step)

    monkeypatch.setattr(composer_path.run.trainer, "LateLosses", Late)
    loader = DataLoader([*samples(12)], batch_size=3, collate_fn=PackedCollator(70))  # type: ignore[arg-type]
    spec = DataSpec(
        loader,
        split_batch=split_batch,
        microbatch_transforms=lambda batch: batch.to("meta"),
        get_num_samples_in_batch=lambda batch: len(batch.sample_ids),
        get_num_tokens_in_batch=lambda batch: {"total": len(batch.input_ids), "loss_generating": batch.loss_weight},
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer = StepTrainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.AdamW(trainable),
        schedulers=ConstantScheduler(),
        max_duration="1ep",
        device=device,
        algorithms=[GradientClipping("norm", 1.0)],
        callbacks=[leaving, SpeedReport(window_size=1), LRMonitor(), BatchReport()],
        loggers=[TensorboardLogger(str(tmp_path)), StepLine()],
        accumulate_train_batch_on_tokens=True,
        device_train_microbatch_size=3,
        progress_bar=False,
    )
    with Reads() as reads:
        trainer.fit()
    trainer.close()
    assert reads.found == []
    lines = [line for line in capsys.readouterr().err.splitlines() if " loss " in line]
    assert [line.split()[2:5] for line in lines] == [[f"{step}/4", "loss", f"{step}.0000"] for step in range(1, 5)]
    assert {step for step, _ in asked} == {1, 2, 3, 4}
    assert all(when > step for step, when in asked if step < 4), asked  # the last step's at the end


def test_cutting_leaves_page_locked_what_was_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no page-locked memory here; whether it is asked for can be seen nevertheless."""
    asked: list[bool] = []
    empty_like = torch.empty_like

    def note(tensor: torch.Tensor, pin_memory: bool = False) -> torch.Tensor:
        asked.append(pin_memory)
        return empty_like(tensor)

    batch = PackedCollator()(samples())
    monkeypatch.setattr(torch, "empty_like", note)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    batch.cut(2, 5)
    assert asked == [True] * 3  # borders, supervised_index, image_index: all that isn't a view


def test_pinning_page_locks_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's DataLoader asks for it by this name; there is no page-locked memory here either."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: pinned.append(self) or self.clone())
    batch = PackedCollator()(samples())
    other = pin_memory(batch, "cuda")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == len(pinned) > 10
    assert isinstance(other, Batch) and other.sources == batch.sources
    assert other.input_ids is not batch.input_ids and torch.equal(other.input_ids, batch.input_ids)
