"""AdamW with a learning rate for each module, and Composer's schedulers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from composer_path.models.path_mllm import MODULES, PathMLLM


def build_optimizer(
    model: PathMLLM,
    *,
    name: str = "adamw",
    lr: float | Mapping[str, float] = 1e-3,
    weight_decay: float = 0.0,
    **keywords: Any,
) -> torch.optim.AdamW:
    """AdamW over the trained parameters; biases and norms (everything with one dimension) never decay.

    Args:
        model: Its parameters that require a gradient.
        name: `adamw`.
        lr: One for all, or by module: `{projector: 2e-3, language_model: 2e-5}`.
        weight_decay: On matrices.
        **keywords: Of `torch.optim.AdamW`; `fused` defaults to whether a GPU is there.

    Raises:
        ValueError: Nothing is trained, or a trained module has no learning rate.
    """
    if name != "adamw":
        raise ValueError(f"optimizer.name: unknown '{name}'; there is 'adamw'")
    groups: list[dict[str, Any]] = []
    for module_name in MODULES:
        trained = [p for p in getattr(model, module_name).parameters() if p.requires_grad]
        if not trained:
            continue
        if isinstance(lr, Mapping) and module_name not in lr:
            raise ValueError(f"optimizer.lr: no learning rate for the trained module '{module_name}'")
        rate = lr[module_name] if isinstance(lr, Mapping) else lr
        for decay, parameters in (
            (weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": module_name})
    if not groups:
        raise ValueError("model.trainable: nothing to train")
    keywords.setdefault("fused", torch.cuda.is_available())
    return torch.optim.AdamW(groups, **keywords)


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Numbers of trained and frozen parameters."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {"trained": trained, "frozen": sum(p.numel() for p in module.parameters()) - trained}


def describe_parameters(model: PathMLLM) -> str:
    """One line on what is trained and what is frozen, with the numbers of weights and how frozen ones are held."""
    words: dict[str, list[str]] = {"trained": [], "frozen": []}
    for name in MODULES:
        parameters = list(getattr(model, name).parameters())
        trained = any(p.requires_grad for p in parameters)
        held = "" if trained else ", " + "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        count = sum(p.numel() for p in parameters)
        words["trained" if trained else "frozen"].append(f"{name} ({count:,} weights{held})")
    return "; ".join(f"{state}: {', '.join(names) or 'nothing'}" for state, names in words.items())
