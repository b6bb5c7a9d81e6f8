"""AdamW with a learning rate for each module, also with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from composer_path.models.path_mllm import PathMLLM
from composer_path.models.pattern import MODULES

OptimizerName = Literal["adamw", "adamw_8bit"]


def build_optimizer(
    model: PathMLLM,
    *,
    name: OptimizerName = "adamw",
    lr: float | Mapping[str, float],
    weight_decay: float = 0.0,
    **keywords: Any,
) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; biases and norms (everything with one dimension) never decay.

    Args:
        model: Its parameters that require a gradient.
        name: `adamw`, or `adamw_8bit`: torchao's, whose two moments take 2 bytes a weight instead of 8. Not exact: for
            models that don't fit otherwise.
        lr: One for all, or by module: `{projector: 2e-3, language_model: 2e-5}`.
        weight_decay: On matrices.
        **keywords: Of `torch.optim.AdamW` (`fused` None: where a GPU is there) or of torchao's `AdamW8bit`.

    Raises:
        ValueError: Nothing is trained, a trained module has no learning rate, or torchao isn't installed.
    """
    cls = optimizer_class(name)
    rates = lr if isinstance(lr, Mapping) else dict.fromkeys(MODULES, lr)
    groups: list[dict[str, Any]] = []
    for module_name in MODULES:
        trained = [p for p in getattr(model, module_name).parameters() if p.requires_grad]
        if not trained:
            continue
        if (rate := rates.get(module_name)) is None:
            raise ValueError(f"optimizer.lr: no learning rate for the trained module '{module_name}'")
        matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        for decay, parameters in ((weight_decay, matrices), (0.0, others)):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": module_name})
    if not groups:
        raise ValueError("model.trainable: nothing to train")
    if name == "adamw_8bit":
        for group in groups:
            group["lr"] = torch.tensor(group["lr"])  # its compiled step would be compiled again for each new number
    elif keywords.get("fused") is None:
        keywords["fused"] = torch.cuda.is_available()
    return cls(groups, **keywords)


def optimizer_class(name: OptimizerName) -> type[torch.optim.Optimizer]:
    """The class behind a name; ValueError where there is none, or torchao isn't installed."""
    if name == "adamw":
        return torch.optim.AdamW
    if name not in get_args(OptimizerName):
        raise ValueError(f"optimizer.name: unknown '{name}'; there are {', '.join(get_args(OptimizerName))}")
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        fix = "needs the package torchao (pip install composer_path[lowmem])"
        raise ValueError(f"optimizer.name: 'adamw_8bit' {fix}") from error
    return AdamW8bit


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Numbers of trained and frozen parameters."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {"trained": trained, "frozen": sum(p.numel() for p in module.parameters()) - trained}


def describe_parameters(model: PathMLLM) -> str:
    """One line on what is trained and what is frozen, with the numbers of weights and how frozen ones are held.

    A module of which a part is trained says how many of its weights are.
    """
    words: dict[str, list[str]] = {"trained": [], "frozen": []}
    for name in MODULES:
        parameters = list(getattr(model, name).parameters())
        trained = any(p.requires_grad for p in parameters)
        held = "" if trained else ", " + "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        count, learning = (sum(p.numel() for p in parameters if p.requires_grad or all_of) for all_of in (True, False))
        held = f", {learning:,} of them trained" if 0 < learning < count else held
        words["trained" if trained else "frozen"].append(f"{name} ({count:,} weights{held})")
    return "; ".join(f"{state}: {', '.join(names) or 'nothing'}" for state, names in words.items())
