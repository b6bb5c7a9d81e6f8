"""AdamW with learning rates by module, by pattern and by depth, also with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from composer_path.models.language_types import decoder_blocks
from composer_path.models.path_mllm import PathMLLM
from composer_path.models.pattern import MODULES, pick

# Of a vision encoder's weights outside of its blocks, those that come after them, by the first word of their names.
AFTER_BLOCKS = ("norm", "fc_norm", "ln_post", "proj", "head", "attn_pool")
OptimizerName = Literal["adamw", "adamw_8bit"]


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
    name: OptimizerName = "adamw",
    lr: float | Mapping[str, float],
    weight_decay: float = 0.0,
    groups: Sequence[Mapping[str, Any]] | None = None,
    layer_wise_lr_decay: float | None = None,
    **keywords: Any,
) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; biases and norms (everything with one dimension) never decay.

    Args:
        model: Its parameters that require a gradient.
        name: `adamw`, or `adamw_8bit`: torchao's, whose two moments take 2 bytes a weight instead of 8. Not exact: for
            models that don't fit otherwise.
        lr: One for all, or by module: `{projector: 2e-3, language_model: 2e-5}`.
        weight_decay: On matrices.
        groups: Keywords of `OwnRate` for parts of the model; the first that matches a weight counts.
        layer_wise_lr_decay: Factor by which the rate falls from each block of the language model and the vision encoder
            to the one before it; what comes after the last block has the whole rate, embeddings the lowest.
        **keywords: Of `torch.optim.AdamW` (`fused` None: where a GPU is there) or of torchao's `AdamW8bit`.

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
    if name == "adamw_8bit":
        for group in built:
            group["lr"] = torch.tensor(group["lr"])  # its compiled step would be compiled again for each new number
    elif keywords.get("fused") is None:
        keywords["fused"] = torch.cuda.is_available()
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


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """What the numbers of groups in metrics (`lr-AdamW/group0`) stand for, a line each."""
    lines = []
    for at, group in enumerate(optimizer.param_groups):
        warmup = f", warm-up {group['t_warmup']}" if "t_warmup" in group else ""
        count = sum(weight.numel() for weight in group["params"])
        rate, decay = f"lr {float(group['lr']):.3g}", f"weight decay {group['weight_decay']:g}"
        lines.append(f"group{at}: {group['name']}, {count:,} weights, {rate}, {decay}{warmup}")
    return "\n".join(lines)
