"""Takes a run up where a checkpoint left it: everything from there but what the YAML says anew."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

from composer_path.checkpoints.folder import CheckpointFolder
from composer_path.checkpoints.newest import Found
from composer_path.checkpoints.reading import load_into
from composer_path.checkpoints.trained_only import TrainedOnly


class Resume(Callback):
    """Loads a checkpoint when the model is spread over the ranks, and random states when training begins.

    What is set by the YAML's optimizer and scheduler goes before what the checkpoint holds.

    Args:
        found: The checkpoint; None for a run from the start.
        weights_only: Take its weights alone.
        trained_only: Switched on here: from then on, state dicts are those of checkpoints.
        folder: Where it lies; forgets what it brought here.
    """

    def __init__(
        self, found: Found | None, weights_only: bool, trained_only: TrainedOnly, folder: CheckpointFolder | None = None
    ) -> None:
        self.found, self.weights_only, self.trained_only, self.folder = found, weights_only, trained_only, folder
        self.random_states: list[dict[str, Any]] = []
        self.frozen = ""

    def state_dict(self) -> dict[str, Any]:
        """What somebody froze since the start, a name a line: who does so at one moment won't do it again."""
        return {"frozen": "\n".join(sorted(self.trained_only.frozen_since()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up, to freeze it when all else is loaded."""
        self.frozen = state["frozen"]

    def before_load(self, state: State, logger: Logger) -> None:
        """Load."""
        self.trained_only.active = True
        if self.found is None:
            return
        settings = _Settings(state)
        self.random_states = load_into(self.found.path, state, logger, self.weights_only)
        if not self.weights_only:
            settings.apply(state)
            self.trained_only.freeze(self.frozen.splitlines())
        if self.folder is not None:
            dist.barrier()
            self.folder.forget(self.found.path.name)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Go on with the random numbers, where an epoch begins; Composer restores them nowhere else."""
        if state.timestamp.batch_in_epoch == 0:
            self._restore()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Amid an epoch: its loader, which draws one when it starts, did so in the process that began the epoch."""
        self._restore()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Likewise, where nothing of the epoch was left."""
        self._restore()

    def _restore(self) -> None:
        if dist.get_global_rank() < len(self.random_states):
            reproducibility.load_rng_state([{}] * dist.get_global_rank() + self.random_states[dist.get_global_rank() :])
        self.random_states = []


class _Settings:
    """What the YAML says of optimizers and schedulers, as it was when they were built."""

    def __init__(self, state: State) -> None:
        kept = ("params", "lr", "initial_lr")
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        self.hyperparameters = [{key: value for key, value in group.items() if key not in kept} for group in groups]
        self.initial = [group.get("initial_lr", group["lr"]) for group in groups]
        self.initial = [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in self.initial]
        self.base = [list(scheduler.base_lrs) for scheduler in state.schedulers]

    def apply(self, state: State) -> None:
        """Put them in place of what was loaded; a rate keeps its place in the schedule."""
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        for group, settings, initial in zip(groups, self.hyperparameters, self.initial, strict=True):
            group.update(settings)
            before = group.get("initial_lr", initial)
            if float(before) != float(initial):
                rate = group["lr"] * (initial / before) if float(before) else initial
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].copy_(torch.as_tensor(rate))
                else:
                    group["lr"] = float(rate)
                group["initial_lr"] = initial
        for scheduler, base in zip(state.schedulers, self.base, strict=True):
            scheduler.base_lrs = base
