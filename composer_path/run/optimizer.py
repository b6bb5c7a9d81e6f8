"""The optimizer: AdamW or another one by its name, with learning rates by module, by pattern and by depth."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.optim import DecoupledAdamW, DecoupledSGDW
from torch import nn

from composer_path.models.language_types import decoder_blocks
from composer_path.models.path_mllm import PathMLLM
from composer_path.models.pattern import MODULES, pick
from composer_path.models.rounded_linear import num_weights
from composer_path.own_parts.registry import own_classes
from composer_path.run.lion import Lion

# Of a vision encoder's weights outside of its blocks, those that come after them, by the first word of their names.
AFTER_BLOCKS = ("norm", "fc_norm", "ln_post", "proj", "head", "attn_pool")
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


@dataclass(frozen=True)
class OwnRate:
    """What holds for some of the trained weights instead of what holds for all.

    Args:
        match: Which: a pattern of `composer_path.models.pattern`.
        lr: Their learning rate; None for their module's.
        weight_decay: Of their matrices; None for that of all.
        t_warmup: Of their rate, in place of the schedule's (`100ba`, `0.1dur`); None for the schedule's own.
    """

    match: str
    lr: float | None = None
    weight_decay: float | None = None
    t_warmup: str | None = None


def build_optimizer(
    model: PathMLLM,
    *,
    name: str = "adamw",
    lr: float | Mapping[str, float],
    weight_decay: float = 0.0,
    groups: Sequence[Mapping[str, Any]] | None = None,
    layer_wise_lr_decay: float | None = None,
    **keywords: Any,
) -> torch.optim.Optimizer:
    """An optimizer over the trained parameters; biases and norms (everything with one dimension) never decay.

    Args:
        model: Its parameters that require a gradient.
        name: One of `OPTIMIZERS`, a class of one's own, or `adamw_8bit`: torchao's, whose two moments take 2 bytes a
            weight instead of 8. Not exact: for models that don't fit otherwise.
        lr: One for all, or by module: `{projector: 2e-3, language_model: 2e-5}`.
        weight_decay: On matrices.
        groups: Keywords of `OwnRate` for parts of the model; the first that matches a weight counts.
        layer_wise_lr_decay: Factor by which the rate falls from each block of the language model and the vision encoder
            to the one before it; what comes after the last block has the whole rate, embeddings the lowest.
        **keywords: Of the optimizer's class; `fused` None: where a GPU is there.

    Raises:
        ValueError: Nothing is trained, a trained module has no learning rate, a group matches nothing that is trained
            and has no group yet, no block is trained whose rate could decay, or torchao isn't installed.
    """
    cls = optimizer_class(name)
    rates = lr if isinstance(lr, Mapping) else dict.fromkeys(MODULES, lr)
    own = [OwnRate(**each) for each in groups or ()]
    owned, depths = _owners(model, own), _depths(model) if layer_wise_lr_decay is not None else {}
    found: dict[tuple[int, int, int, bool], dict[str, Any]] = {}
    for order, module_name in enumerate(MODULES):
        for parameter in getattr(model, module_name).parameters():
            if not parameter.requires_grad:
                continue
            at, depth, still = owned.get(parameter, len(own)), depths.get(parameter, 0), parameter.ndim <= 1
            special = own[at] if at < len(own) else OwnRate(module_name)
            rate = rates.get(module_name) if special.lr is None else special.lr
            if rate is None:
                raise ValueError(f"optimizer.lr: no learning rate for the trained module '{module_name}'")
            decay = weight_decay if special.weight_decay is None else special.weight_decay
            group: dict[str, Any] = {"params": [], "lr": rate * (layer_wise_lr_decay or 1.0) ** depth}
            group |= {"weight_decay": 0.0 if still else decay, "name": special.match}
            if special.t_warmup is not None:
                group["t_warmup"] = special.t_warmup
            found.setdefault((order, at, depth, still), group)["params"].append(parameter)
    if layer_wise_lr_decay is not None and not any(depth for _, _, depth, _ in found):
        fix = "remove it, or train blocks of the language model or the vision encoder"
        raise ValueError(f"optimizer.layer_wise_lr_decay: found {layer_wise_lr_decay}, but no block is trained; {fix}")
    built: list[dict[str, Any]] = [found[key] for key in sorted(found)]
    if not built:
        raise ValueError("model.trainable: nothing to train")
    if weight_decay and "weight_decay" not in inspect.signature(cls).parameters:
        raise ValueError(f"optimizer.weight_decay: must be 0 for '{name}', which has none; found {weight_decay}")
    if name == EIGHT_BIT:
        for group in built:
            group["lr"] = torch.tensor(group["lr"])  # its compiled step would be compiled again for each new number
    elif name in ("adamw", "adam", "sgd") and keywords.get("fused") is None:
        keywords["fused"] = torch.cuda.is_available()
    if isinstance(keywords.get("betas"), list):  # as YAML has it
        keywords["betas"] = tuple(keywords["betas"])
    if name != EIGHT_BIT:
        keywords["lr"] = built[0]["lr"]  # Composer's have no default; each group has its own
    return cls(built, **keywords)


def _owners(model: PathMLLM, own: Sequence[OwnRate]) -> dict[nn.Parameter, int]:
    """Which of the groups a trained parameter belongs to; ValueError where one would be left without any."""
    named = dict(model.named_parameters(remove_duplicate=False))
    owned: dict[nn.Parameter, int] = {}
    for at, one in enumerate(own):
        where = f"optimizer.groups[{at}].match"
        trained = [named[name] for name in sorted(pick(model, one.match, where)) if named[name].requires_grad]
        if not trained:
            raise ValueError(f"{where}: nothing of '{one.match}' is trained; name it in model.trainable, or remove it")
        new = [parameter for parameter in trained if parameter not in owned]
        if not new:
            raise ValueError(f"{where}: all of '{one.match}' belongs to groups before it; put it first, or remove it")
        owned |= dict.fromkeys(new, at)
    return owned


def _depths(model: PathMLLM) -> dict[nn.Parameter, int]:
    """How many blocks, and embeddings, a parameter lies below the end of its module."""
    embedding: nn.Module = model.language_model.get_input_embeddings()
    layers, blocks = decoder_blocks(model.language_model), model.vision_encoder.blocks
    depths = {
        weight: len(blocks) + 1
        for name, weight in model.vision_encoder.trunk.named_parameters()
        if name.rpartition("visual.")[2].split(".")[0] not in AFTER_BLOCKS
    }
    depths |= dict.fromkeys(embedding.parameters(), len(layers) + 1)
    for stack in (layers, blocks):
        for above, block in enumerate(reversed(list(stack)), start=1):
            depths |= dict.fromkeys(block.parameters(), above)
    return depths


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
        from composer_path.run.adamw_8bit import AdamW8bit
    except ImportError as error:
        fix = "needs the package torchao (pip install composer_path[lowmem])"
        raise ValueError(f"optimizer.name: 'adamw_8bit' {fix}") from error
    return AdamW8bit


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Numbers of trained and frozen parameters."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {"trained": trained, "frozen": sum(map(num_weights, module.parameters())) - trained}


def describe_parameters(model: PathMLLM) -> str:
    """One line on what is trained and what is frozen, with the numbers of weights and how frozen ones are held.

    A module of which a part is trained says how many of its weights are.
    """
    words: dict[str, list[str]] = {"trained": [], "frozen": []}
    for name in MODULES:
        parameters = list(getattr(model, name).parameters())
        trained = any(p.requires_grad for p in parameters)
        held = "" if trained else ", " + "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        count, learning = (
            sum(num_weights(p) for p in parameters if p.requires_grad or all_of) for all_of in (True, False)
        )
        held = f", {learning:,} of them trained" if 0 < learning < count else held
        words["trained" if trained else "frozen"].append(f"{name} ({count:,} weights{held})")
    return "; ".join(f"{state}: {', '.join(names) or 'nothing'}" for state, names in words.items())


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """What the numbers of groups in metrics (`lr-AdamW/group0`) stand for, a line each."""
    lines = []
    for at, group in enumerate(optimizer.param_groups):
        warmup = f", warm-up {group['t_warmup']}" if "t_warmup" in group else ""
        count = sum(weight.numel() for weight in group["params"])
        rate, decay = f"lr {float(group['lr']):.3g}", f"weight decay {group['weight_decay']:g}"
        lines.append(f"group{at}: {group['name']}, {count:,} weights, {rate}, {decay}{warmup}")
    return "\n".join(lines)
