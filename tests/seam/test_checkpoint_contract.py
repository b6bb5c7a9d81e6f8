"""What this project takes for granted of Composer's checkpoints, and of how it shards: by a bare Trainer.

docs/seam.md says where each of these is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_trainer import Bare, Notes, Rows, rows, trainer_of
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from torch import nn

# --- checkpoints -----------------------------------------------------------------------------------------------------


class Stop(Callback):
    """Ends the run when so many steps are done and saved."""

    def __init__(self, after: int) -> None:
        self.after = after

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.after:
            raise InterruptedError


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Rows, Bare]]:
    """A run that saved each step and epoch, kept all and was stopped after the fifth of six steps."""
    folder, dataset, notes, model = tmp_path_factory.mktemp("stopped"), Rows(), Notes(), Bare()
    notes.kept = 11
    model.model[0].requires_grad_(False)
    model.model.register_state_dict_post_hook(drop_first)
    keep = {"save_interval": "1ba", "save_num_checkpoints_to_keep": 3, "callbacks": [notes, Stop(after=5)]}
    trainer = trainer_of(rows([], dataset=dataset), folder, model=model, **keep)
    with pytest.raises(InterruptedError):
        trainer.fit()
    trainer.close()
    yield folder, dataset, model


def drop_first(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in ("0.weight", "0.bias"):
        state.pop(prefix + name, None)


def forget_first(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if ".0." not in key and key[0] != "0"]


def test_single_files_are_named_by_epoch_and_batch_and_the_oldest_go(stopped: tuple[Path, Rows, Bare]) -> None:
    folder, _, _ = stopped
    files = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert files == {"ep0-ba3-rank0.pt", "ep1-ba4-rank0.pt", "ep1-ba5-rank0.pt"}
    assert os.readlink(folder / "latest-rank0.pt") == "ep1-ba5-rank0.pt"


def test_a_checkpoint_holds_what_the_state_dict_hooks_leave_and_the_loaders_place(
    stopped: tuple[Path, Rows, Bare],
) -> None:
    folder, dataset, _ = stopped
    state = torch.load(folder / "ep1-ba5-rank0.pt", weights_only=False)["state"]
    assert set(state["model"]) == {"model.1.weight", "model.1.bias"}
    assert {"model", "optimizers", "schedulers", "timestamp", "callbacks", "algorithms", "dataset_state"} <= set(state)
    assert state["dataset_state"]["train"] == {"samples": 8}
    assert {"kept": 11} in [dict(kept) for kept in dict(state["callbacks"]).values()]
    assert dataset.asked[:4] == [(4, True), (8, True), (10, True), (4, True)]


def test_a_resumed_run_gives_the_dataset_its_place_and_passes_over_no_batch(
    stopped: tuple[Path, Rows, Bare], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, trained = stopped
    asked: list[bytes] = []
    monkeypatch.setitem(globals(), "harmless", lambda path, specs=None: asked.append(Path(path).read_bytes()) or True)
    monkeypatch.setenv("CHECKPOINT_VALIDATION_FUNCTION", f"{__name__}.harmless")
    dataset, notes, model = Rows(), Notes(), Bare()
    model.model[0].requires_grad_(False)
    model.model.register_state_dict_post_hook(drop_first)
    model.model.register_load_state_dict_post_hook(forget_first)
    seen: dict[str, bool] = {}

    class Look(Callback):
        def before_load(self, state: State, logger: Logger) -> None:
            seen["before"] = torch.equal(model.model[1].weight, trained.model[1].weight)

        def after_load(self, state: State, logger: Logger) -> None:
            seen["after"] = torch.equal(model.model[1].weight, trained.model[1].weight)

    trainer = trainer_of(rows([], dataset=dataset), folder, model=model, callbacks=[notes, Look()])
    assert seen == {"before": False, "after": True}
    assert set(asked) == {(folder / "ep1-ba5-rank0.pt").read_bytes()}
    assert dataset.given == [{"samples": 8}] and notes.kept == 11
    assert trainer.state.timestamp.batch == 5 and trainer.state.timestamp.sample_in_epoch == 8
    saver = next(callback for callback in trainer.state.callbacks if isinstance(callback, CheckpointSaver))
    assert saver.saved_checkpoints == [] and saver.num_checkpoints_to_keep == -1
    assert saver.folder.format(run_name="bare") == str(folder)
    trainer.fit()
    trainer.close()
    assert notes.batches["batch_start"] == [4, 4, 2]  # this dataset begins anew; none of its batches was passed over


def test_a_file_that_the_validation_refuses_is_not_loaded(
    stopped: tuple[Path, Rows, Bare], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, specs: Any = None) -> bool:
        raise ValueError("refused")

    monkeypatch.setitem(globals(), "harmless", refuse)
    monkeypatch.setenv("CHECKPOINT_VALIDATION_FUNCTION", f"{__name__}.harmless")
    with pytest.raises(ValueError, match="refused"):
        trainer_of(rows([]), load_path=str(stopped[0] / "ep1-ba5-rank0.pt"))


# --- sharding --------------------------------------------------------------------------------------------------------


class Units(Bare):
    """A model whose child names its units."""

    def __init__(self) -> None:
        super().__init__()
        self.model.fsdp_wrap_fn = lambda module: module is self.model[1]  # type: ignore[assignment]


def test_fsdp2_shards_the_child_and_the_units_it_names_and_saves_a_folder(tmp_path: Path) -> None:
    model, notes = Units(), Notes()
    mixed = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
    config = FSDP2Config(mixed_precision=mixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    more = {"max_duration": "1ba", "save_interval": "1ba", "parallelism_config": {"fsdp": config}}
    trainer = trainer_of(rows([1]), tmp_path, model=model, optimizers=optimizer, callbacks=[notes], **more)
    units = {name for name, module in model.named_modules() if hasattr(module, "unshard")}
    assert units == {"model", "model.1"}
    trainer.fit()
    trainer.close()
    assert {type(parameter).__name__ for parameter in model.parameters()} == {"DTensor"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert trainer.state.outputs.dtype == torch.bfloat16 and trainer.state.fsdp_sharded_state_dict_enabled
    assert {path.name for path in (tmp_path / "ep0-ba1").iterdir()} == {".metadata", "__0_0.distcp"}
    assert os.readlink(tmp_path / "latest-rank0.pt") == "ep0-ba1"
    saver = next(callback for callback in trainer.state.callbacks if isinstance(callback, CheckpointSaver))
    assert saver.saved_checkpoints == [str(tmp_path / "ep0-ba1" / "__0_0.distcp")]


def test_sharding_has_the_fields_that_a_yaml_may_set() -> None:
    names = {field.name for field in fields(FSDP2Config)}
    assert {"device_mesh", "reshard_after_forward", "state_dict_type", "mixed_precision", "verbose"} <= names
    with pytest.raises(TypeError):
        FSDP2Config(reshard=True)  # type: ignore[call-arg]
    defaults = FSDP2Config()
    assert (defaults.reshard_after_forward, defaults.state_dict_type) == (True, "sharded")
    assert defaults.mixed_precision == "DEFAULT" and not defaults.activation_checkpointing
    first = {field.name: field.default for field in fields(FSDPConfig)}
    assert first["sync_module_states"] is False and first["state_dict_type"] == "full"
