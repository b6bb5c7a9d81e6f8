"""Checkpoints for resuming: what is written into one, and which are kept (the newest few).

Written are the weights that are trained, and what Composer adds: moments of the optimizer, schedulers, time, random
states, states of callbacks and algorithms, and the loader's place in the data (`ConversationDataset.state_dict`).
Frozen weights are not: they come from their own files, or from the seed, at every start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


class TrainedOnly:
    """Keeps frozen weights out of a module's state dict, and doesn't miss them on loading.

    They come from their own files at every start; a 13B model's would take 26 GB in each checkpoint. It is switched on
    after the weights have been spread over the ranks, which goes through the state dict too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.active = False

        def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            if self.active:
                for name in frozen_names(module):
                    state.pop(prefix + name, None)

        def forget_missing(module: nn.Module, incompatible: Any) -> None:
            if self.active:
                frozen = tuple(frozen_names(module))
                incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(frozen)]

        module.register_state_dict_post_hook(drop_frozen)
        module.register_load_state_dict_post_hook(forget_missing)

    @contextmanager
    def everything(self) -> Iterator[None]:
        """Within it, the state dict has the frozen weights too."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active


def frozen_names(module: nn.Module) -> set[str]:
    """Names of a module's frozen parameters as they stand in its state dict, tied ones under each of their names."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def gather_weights(model: nn.Module, trained_only: TrainedOnly, *, everything: bool) -> dict[str, torch.Tensor]:
    """The whole weights of a module, sharded or not, on rank 0's CPU; empty on other ranks. All ranks call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with trained_only.everything() if everything else nullcontext():
        return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]


class ResumableCheckpoints(Callback):
    """Switches `TrainedOnly` on before a checkpoint is read, and lets the saver prune those of an earlier process."""

    def __init__(self, trained_only: TrainedOnly) -> None:
        self.trained_only = trained_only

    def before_load(self, state: State, logger: Logger) -> None:
        """From here on, state dicts are those of checkpoints."""
        self.trained_only.active = True

    def fit_start(self, state: State, logger: Logger) -> None:
        """Composer's saver only counts its own process's checkpoints; tell it of those a resumed run left."""
        for saver in state.callbacks:
            if isinstance(saver, CheckpointSaver) and saver.num_checkpoints_to_keep >= 0:
                folder, sharded = saver.folder.format(run_name=state.run_name), state.fsdp_sharded_state_dict_enabled
                if sharded or dist.get_global_rank() == 0:
                    saver.saved_checkpoints[:0] = earlier_checkpoints(Path(folder), sharded)


def earlier_checkpoints(folder: Path, sharded: bool) -> list[str]:
    """Checkpoints in a folder, oldest first, as Composer's saver names them."""
    found = []
    for path in folder.glob("ep*-ba*"):
        match = re.match(r"ep\d+-ba(\d+)", path.name)
        if match and path.is_dir() == sharded and not path.is_symlink():
            found.append((int(match[1]), str(path / f"__{dist.get_global_rank()}_0.distcp") if sharded else str(path)))
    return [path for _, path in sorted(found)]
