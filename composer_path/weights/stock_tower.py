"""A stock LLaVA's vision tower in our words: the keywords of an encoder that gives the tokens it takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer_path.storage.json_object import read_json_object
from composer_path.weights.vision_folder import white_of

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Of transformers' vision models, what a configuration leaves out.
CLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP = CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
TOWERS = {
    "clip_vision_model": ("timm/vit_base_patch16_clip_224", CLIP),
    "siglip_vision_model": ("timm/vit_base_patch16_siglip_224", SIGLIP),
}
ALIASES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
LAYERS = {"gelu": "GELU", "quick_gelu": "QuickGELU", "gelu_pytorch_tanh": "GELUTanh"}


def tower_keywords(
    folder: Path, said: Mapping[str, Any], layer: Any, llava: Mapping[str, Any], model_type: str = ""
) -> dict[str, Any]:
    """Keywords of the vision encoder that gives the tokens which a LLaVA takes from its tower.

    Args:
        folder: With the tower's `preprocessor_config.json`, if it has one.
        said: The tower's configuration.
        layer: Which hidden state is taken: `-1` the last, `-2` that before the last block.
        llava: The configuration that says which tokens are taken.
        model_type: Of the tower, where `said` doesn't say it.

    Raises:
        ValueError: Another kind of tower, or what ours can't be.
    """
    where = f"'{folder}': its vision tower"
    kind = str(said.get("model_type") or model_type)
    kind = ALIASES.get(kind, kind)
    if kind not in TOWERS:
        raise ValueError(
            f"{where} must be a CLIP or SigLIP of transformers; found {kind!r:.60}; give its parts one by one"
        )
    name, usual = TOWERS[kind]
    values = {key: said.get(key, default) for key, default in usual.items()}
    for key, value in values.items():
        wanted: tuple[type, ...] = (str,) if key == "hidden_act" else (float,) if key == "layer_norm_eps" else (int,)
        if type(value) not in wanted or (not isinstance(value, str) and not 0 < value < 10**5):
            rule = f"{key} must be of type {wanted[0].__name__}, such as a ViT can have"
            raise ValueError(f"{where}: {rule}; found {value!r:.60}")
    if values["hidden_act"] not in LAYERS:
        raise ValueError(f"{where}: hidden_act must be one of {', '.join(LAYERS)}; found {values['hidden_act']!r:.60}")
    blocks = values["num_hidden_layers"]
    depth = layer if type(layer) is int and layer >= 0 else blocks + 1 + layer if type(layer) is int else 0
    if not 1 <= depth <= blocks:
        raise ValueError(f"{where} must give a hidden state of one of its {blocks} blocks; found layer {layer!r:.60}")
    strategy = llava.get("vision_feature_select_strategy", "default")
    words = {"default": "patches", "full": "all"}
    if strategy not in words or (strategy == "default" and kind == "siglip_vision_model"):
        fits = "'full', as SigLIP has no first token to leave out" if strategy in words else "'default' or 'full'"
        raise ValueError(f"{where}: vision_feature_select_strategy must be {fits}; found {strategy!r:.60}")
    width = values["hidden_size"]
    kwargs: dict[str, Any] = {
        "patch_size": values["patch_size"],
        "embed_dim": width,
        "depth": depth,
        "num_heads": values["num_attention_heads"],
        "mlp_ratio": _ratio(values["intermediate_size"], width),
        "act_layer": LAYERS[values["hidden_act"]],
        "norm_eps": values["layer_norm_eps"],
        "final_norm": False,  # a LLaVA takes hidden states as they are
    }
    mean, std = _normalization(folder, kind)
    size = {"image_size": values["image_size"], "tokens": words[strategy]}
    return {"name": name, **size, "mean": list(mean), "std": list(std), "kwargs": kwargs}


def check_tower_shapes(where: str, shapes: Mapping[str, tuple[int, ...]], keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that the tensors contradict, before a tower of such sizes is built.

    Args:
        where: The folder.
        shapes: Of its tensors; those of a tower are known by how their names end.
        keywords: From `tower_keywords`.

    Raises:
        ValueError: With what is said and what was found.
    """
    sizes, side = keywords["kwargs"], keywords["kwargs"]["patch_size"]
    width, prefix = sizes["embed_dim"], int("_clip_" in keywords["name"])
    expected = {
        "embeddings.patch_embedding.weight": (width, 3, side, side),
        "embeddings.position_embedding.weight": ((keywords["image_size"] // side) ** 2 + prefix, width),
        f"encoder.layers.{sizes['depth'] - 1}.mlp.fc1.weight": (int(width * sizes["mlp_ratio"]), width),
    }
    for ending, shape in expected.items():
        found = next((found for name, found in shapes.items() if f".{name}".endswith(f".{ending}")), None)
        if found != shape:
            words = "nothing" if found is None else str(list(found))
            rule = f"{ending} must be {list(shape)}, as its config.json says"
            raise ValueError(f"'{where}': its vision tower's {rule}; found {words}; take the folder of one model")


def _ratio(inner: int, width: int) -> float:
    """The ratio of which timm makes this width again, by cutting the product."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else (inner + 0.5) / width


def _normalization(folder: Path, kind: str) -> tuple[Any, Any]:
    """Mean and std of the images: what the folder says, else the tower's own."""
    file = folder / "preprocessor_config.json"
    said = read_json_object(file) if file.is_file() else {}
    if said.get("do_normalize") is False or white_of(file, said) != 1:
        raise ValueError(f"'{file}': images must be scaled to 1 and normalised; found otherwise; take another folder")
    own = (CLIP_MEAN, CLIP_STD) if kind == "clip_vision_model" else ((0.5,) * 3, (0.5,) * 3)
    found = tuple(said.get(key, default) for key, default in zip(("image_mean", "image_std"), own, strict=True))
    for key, value in zip(("image_mean", "image_std"), found, strict=True):
        numbers = value if isinstance(value, list | tuple) else ()
        least = 0 if key == "image_mean" else 1e-6
        if len(numbers) != 3 or not all(type(number) in (int, float) and least <= number <= 1e3 for number in numbers):
            raise ValueError(f"'{file}': {key} must be three numbers; found {value!r:.60}")
    return found
