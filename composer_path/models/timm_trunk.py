"""A ViT of timm's as a giver of tokens: no head, no pooling, and layers by their name."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import timm.layers
from torch import nn

from composer_path.models.parameters import built_emptied

LIBRARIES = {"timm.layers": timm.layers, "torch.nn": nn, "nn": nn}


def build_timm_trunk(name: str, image_size: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """A ViT of timm's without head and pooling, random weights.

    What of its norm comes before pooling stays: a model that normalises what is pooled (`fc_norm`: those that average)
    gives tokens without a norm, as its own `forward_features` does. Besides timm's keywords there is `norm_eps`, what
    every LayerNorm adds to the variance.
    """
    if not isinstance(name, str) or not timm.is_model(name):
        nearest = difflib.get_close_matches(str(name), timm.list_models(), n=3)
        raise ValueError(f"vision_encoder.name: timm has no model '{name}'; nearest names: {nearest}")
    settings = {key: layer_class(key, value) if key.endswith("_layer") else value for key, value in kwargs.items()}
    settings |= {} if image_size is None else {"img_size": image_size}
    norm_eps = settings.pop("norm_eps", None)
    if norm_eps is not None and (type(norm_eps) not in (int, float) or not 0 < norm_eps < 1):
        raise ValueError(f"vision_encoder.kwargs: norm_eps must be a number between 0 and 1, found {norm_eps!r}")
    try:
        trunk: Any = built_emptied(lambda: timm.create_model(name, pretrained=False, num_classes=0, **settings))
    except (TypeError, AssertionError) as error:  # an unknown keyword; sizes that timm asserts
        raise ValueError(f"vision_encoder.kwargs: timm's '{name}' doesn't take {settings}: {error}") from error
    lacking = [part for part in ("blocks", "num_prefix_tokens", "patch_embed", "embed_dim") if not hasattr(trunk, part)]
    if lacking:
        raise ValueError(
            f"vision_encoder.name: timm's '{name}' isn't a ViT whose tokens can be taken (has no {lacking})"
        )
    trunk.reset_classifier(0, "")  # tokens as they are before pooling
    if hasattr(trunk, "fc_norm"):
        trunk.fc_norm = nn.Identity()
    for module in trunk.modules() if norm_eps is not None else ():
        if isinstance(module, nn.LayerNorm):
            module.eps = float(norm_eps)
    return trunk


def layer_name(value: Any) -> Any:
    """A layer of timm.layers or torch.nn as its name, so that the keywords can be written to a file.

    A name may come with its library, as cards write it: `torch.nn.SiLU`, `timm.layers.SwiGLUPacked`.
    """
    if isinstance(value, str):
        library, _, name = value.rpartition(".")
        if library and (library not in LIBRARIES or not _is_layer(getattr(LIBRARIES[library], name, None))):
            raise ValueError(f"vision_encoder.kwargs: a layer must be one of timm.layers or torch.nn, found '{value}'")
        return name
    if not callable(value):
        return value
    for source in (timm.layers, nn):
        for name, layer in vars(source).items():
            if layer is value:  # by identity: timm's SwiGLUPacked is a partial, which has no name of its own
                return name
    raise ValueError(f"vision_encoder.kwargs: a layer must be one of timm.layers or torch.nn, found {value!r}")


def layer_class(key: str, value: Any) -> Any:
    """A layer class from its name in timm.layers or torch.nn; timm's own short names (`gelu`) are left for timm."""
    if not isinstance(value, str):
        return value
    for library in (timm.layers, nn):
        if _is_layer(layer := getattr(library, value, None)):
            return layer
    if key == "act_layer":
        try:
            timm.layers.get_act_layer(value)
        except KeyError:
            known = [name for lib in (timm.layers, nn) for name, layer in vars(lib).items() if _is_layer(layer)]
            near = difflib.get_close_matches(value, known, n=2)
            raise ValueError(
                f"vision_encoder.kwargs: {key} must be one of timm.layers or torch.nn, found '{value}'"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            ) from None
    return value


def _is_layer(value: Any) -> bool:
    """A class of modules, or a partial of one as timm's SwiGLUPacked is."""
    made = getattr(value, "func", value)
    return isinstance(made, type) and issubclass(made, nn.Module)
