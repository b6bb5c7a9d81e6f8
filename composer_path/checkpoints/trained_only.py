"""What of a model stands in a checkpoint: what is trained, and whole weights of sharded models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from composer_path.checkpoints.manifest import CheckpointError

log = logging.getLogger(__name__)


class TrainedOnly:
    """Keeps frozen weights out of a module's state dict, and doesn't miss them on loading.

    They come from their own files at every start; a 13B model's would take 26 GB in each checkpoint. It is switched on
    after the weights have been spread over the ranks, which goes through the state dict too.

    What is trained is fixed when this is built, before any callback or algorithm runs: a module that one of them
    freezes later has learned all the same, and stays in everything that is written.

    Attributes:
        frozen: Names of the frozen parameters.
        modules: The children of the module that are trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self.active, self.module = False, module
        self.frozen = frozenset(frozen_names(module))
        trained = {name for name, _ in module.named_parameters(remove_duplicate=False)} - self.frozen
        self.modules = frozenset(name.partition(".")[0] for name in trained)

        def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            if self.active:
                for name in self.frozen:
                    state.pop(prefix + name, None)

        def forget_missing(module: nn.Module, incompatible: Any) -> None:
            if self.active:
                frozen = tuple(self.frozen)
                incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(frozen)]

        module.register_state_dict_post_hook(drop_frozen)
        module.register_load_state_dict_post_hook(forget_missing)

    def frozen_since(self) -> set[str]:
        """Names of trained parameters that a callback or an algorithm froze."""
        return frozen_names(self.module) - self.frozen

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze parameters, as `frozen_since` named them in the run that is gone on with."""
        named = dict(self.module.named_parameters(remove_duplicate=False))
        known = [named[name] for name in names if name in named]
        for parameter in known:
            parameter.requires_grad_(False)
        if known:
            log.info("goes on with %d parameters frozen, as they were when this was left", len(known))

    def check(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Refuse to write a model of which somebody trains more than its YAML says: that would be left out.

        Raises:
            CheckpointError: An optimizer holds weights that were frozen when this was built.
        """
        held = {id(weight) for one in optimizers for group in one.param_groups for weight in group["params"]}
        named = dict(self.module.named_parameters(remove_duplicate=False))
        if more := sorted(
            {name.partition(".")[0] for name in self.frozen if name in named and id(named[name]) in held}
        ):
            fix = "name it there, from the run's start"
            raise CheckpointError(
                f"model.trainable: an optimizer got weights of {', '.join(more)}, which is frozen; {fix}"
            )

    @contextmanager
    def everything(self) -> Iterator[None]:
        """Within it, the state dict has the frozen weights too."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active


def frozen_names(module: nn.Module) -> set[str]:
    """Names of a module's frozen parameters as they stand in its state dict, tied ones under each of their names.

    Only a model that was just built can be asked: in a run, `TrainedOnly` knows what its YAML says.
    """
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def gather_weights(model: nn.Module, trained_only: TrainedOnly, *, everything: bool) -> dict[str, torch.Tensor]:
    """The whole weights of a module, sharded or not, on rank 0's CPU; empty on other ranks. All ranks call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with trained_only.everything() if everything else nullcontext():
        return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]
