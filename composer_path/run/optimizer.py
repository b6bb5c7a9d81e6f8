"""The optimizer: AdamW or another one by its name, with a learning rate for each module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from composer.optim import DecoupledAdamW, DecoupledSGDW
from torch import nn

from composer_path.models.path_mllm import MODULES, PathMLLM
from composer_path.own_parts.registry import own_classes
from composer_path.run.lion import Lion

# Torch's and Composer's that work here; others of torch's, and why not.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "decoupled_adamw": DecoupledAdamW,
    "decoupled_sgdw": DecoupledSGDW,
    "lion": Lion,
}
EIGHT_BIT = "adamw_8bit"
ADAFACTOR = (
    "its averages over rows don't come about under FSDP2; take lion or adamw, or trainer.parallelism_config=null"
)
REFUSED = {
    "lbfgs": "it computes each step's loss several times, which Composer's loop doesn't; use adamw",
    "sparse_adam": "it takes sparse gradients only, and ours are dense; use adamw",
    "muon": "it takes matrices only, and each module has vectors, too; use adamw",
    "asgd": "it averages weights that nothing reads afterwards; use sgd, or the algorithm ema",
    "rprop": "it is made for gradients of the whole set, not of batches; use adamw",
    **dict.fromkeys(("decoupled_lionw", "lionw", "decoupled_lionw_8b"), "llm-foundry's isn't there; use lion"),
    **dict.fromkeys(("adamw_8b", "adam8bit", "adamw8bit", "paged_adamw_8bit"), "use adamw_8bit"),
    **dict.fromkeys(("adam_w", "adamw_torch", "adamw_hf", "adamw_torch_fused"), "use adamw"),
    "decoupled_adam_w": "use decoupled_adamw",
}


def build_optimizer(
    model: PathMLLM,
    *,
    name: str = "adamw",
    lr: float | Mapping[str, float],
    weight_decay: float = 0.0,
    **keywords: Any,
) -> torch.optim.Optimizer:
    """An optimizer over the trained parameters; biases and norms (everything with one dimension) never decay.

    Args:
        model: Its parameters that require a gradient.
        name: One of `OPTIMIZERS`, a class of one's own, or `adamw_8bit`: torchao's, whose two moments take 2 bytes a
            weight instead of 8. Not exact: for models that don't fit otherwise.
        lr: One for all, or by module: `{projector: 2e-3, language_model: 2e-5}`.
        weight_decay: On matrices.
        **keywords: Of the optimizer's class; `fused` None: where a GPU is there.

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
    if weight_decay and "weight_decay" not in inspect.signature(cls).parameters:
        raise ValueError(f"optimizer.weight_decay: must be 0 for '{name}', which has none; found {weight_decay}")
    if name == EIGHT_BIT:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"])  # its compiled step would be compiled again for each new number
    elif name in ("adamw", "adam", "sgd") and keywords.get("fused") is None:
        keywords["fused"] = torch.cuda.is_available()
    if isinstance(keywords.get("betas"), list):  # as YAML has it
        keywords["betas"] = tuple(keywords["betas"])
    if name != EIGHT_BIT:
        keywords["lr"] = groups[0]["lr"]  # Composer's have no default; each group has its own
    return cls(groups, **keywords)


def known_optimizers() -> tuple[str, ...]:
    """The names of all but one's own."""
    return (*OPTIMIZERS, EIGHT_BIT)


def optimizer_class(name: str) -> Any:
    """The class behind a name; ValueError where there is none, or torchao isn't installed."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if name in (own := own_classes("optimizers")):
        return own[name]
    if name != EIGHT_BIT:
        fix = REFUSED.get(name, f"there are {', '.join((*known_optimizers(), *own))}")
        raise ValueError(f"optimizer.name: unknown '{name}'; {fix}")
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
    """One line on what is trained and what is frozen, with the numbers of weights and how frozen ones are held."""
    words: dict[str, list[str]] = {"trained": [], "frozen": []}
    for name in MODULES:
        parameters = list(getattr(model, name).parameters())
        trained = any(p.requires_grad for p in parameters)
        held = "" if trained else ", " + "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        count = sum(p.numel() for p in parameters)
        words["trained" if trained else "frozen"].append(f"{name} ({count:,} weights{held})")
    return "; ".join(f"{state}: {', '.join(names) or 'nothing'}" for state, names in words.items())
