"""A folder with a whole vision-language model: of which kind it is, what it is made of, and whose each tensor is.

Four kinds are read: our own, a stock LLaVA of transformers, LLaVA's own, and the reference's (a fork of LLaVA's).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from composer_path.hugging_face.model_config import checked_config, vision_keywords
from composer_path.storage.json_object import read_json_object
from composer_path.weights.projector_names import WORDS, from_reference_projector, from_stock_projector
from composer_path.weights.stock_tower import check_tower_shapes, tower_keywords
from composer_path.weights.tensor_file import WeightsError, read_tensor_folder, shapes_of_folder, some

Part = Literal["vision_encoder", "projector", "language_model"]
FolderKind = Literal["composer_path", "llava-hf", "llava", "reference"]
REFERENCE_TOWER = "coca_vit-l"
LLAVA_TYPES = ("llava", "llava_llama")
TOWER_FILE = "vision_tower.pt"  # the reference's tower, where it isn't among its tensors
# Whose a tensor is, by what its name begins with; what comes first wins. Behind a whole LLaVA's `model.`, too.
BEGINNINGS: dict[FolderKind, tuple[tuple[str, Part], ...]] = {
    "composer_path": (
        (r"vision_encoder\.", "vision_encoder"),
        (r"projector\.", "projector"),
        (r"language_model\.", "language_model"),
    ),
    "llava-hf": (
        (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_encoder"),
        (r"(model\.)?multi_modal_projector\.", "projector"),
        (r"(model\.)?language_model\.|lm_head\.", "language_model"),
    ),
}
_OLD: tuple[tuple[str, Part], ...] = (
    (r"model\.vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_encoder"),
    (r"model\.mm_projector\.", "projector"),
    (r"model\.(embed_tokens|layers|norm)\.|lm_head\.", "language_model"),
)
BEGINNINGS |= {"llava": _OLD, "reference": _OLD}


@dataclass(frozen=True)
class WholeFolder:
    """A folder and what it is.

    Attributes:
        path: Where it lies.
        kind: Whose names its tensors have.
        config: Its `config.json`.
    """

    path: Path
    kind: FolderKind
    config: dict[str, Any]

    @property
    def marks_images(self) -> bool:
        """Whether it is a LLaVA whose words `<im_start>` and `<im_end>` stand around images."""
        return self.kind in ("llava", "reference") and bool(self.config.get("mm_use_im_start_end"))

    def part_of(self, name: str) -> tuple[Part, str] | None:
        """Whose a tensor is, and its name less its beginning; None for what is nobody's."""
        for beginning, part in BEGINNINGS[self.kind]:
            if found := re.match(beginning, name):
                return part, name[found.end() :]
        return None

    def names(self) -> dict[str, tuple[int, ...]]:
        """All tensors' shapes, by name; of safetensors no data are read.

        Raises:
            WeightsError: There are none, or some belong to no part.
        """
        shapes = shapes_of_folder(self.path)
        if unknown := sorted(name for name in shapes if self.part_of(name) is None):
            raise WeightsError(f"weights: '{self.path}' doesn't fit. Left over ({len(unknown)}): {some(unknown)}")
        return shapes

    def tensors_of(self, part: Part, *, whole: bool = False) -> dict[str, Tensor]:
        """A part's tensors and no others, by their names, less their beginning unless `whole` ones are asked for."""
        found = {name: self.part_of(name) for name in self.names()}
        places = {name: name if whole else place[1] for name, place in found.items() if place and place[0] == part}
        if not places:
            raise WeightsError(f"weights: '{self.path}' holds no {part}; take a whole model's folder")
        return {places[name]: value for name, value in read_tensor_folder(self.path, places.__contains__).items()}

    def projector(self) -> dict[str, Tensor]:
        """The projector's tensors by our names; those that it doesn't know are left over when they are compared."""
        tensors = self.tensors_of("projector")
        if self.kind == "composer_path":
            return tensors
        if self.marks_images:
            words = next(name for name in self.names() if name.endswith(f".{WORDS}"))
            tensors[WORDS] = read_tensor_folder(self.path, words.__eq__)[words]
        return from_stock_projector(tensors) if self.kind == "llava-hf" else from_reference_projector(tensors)


def whole_folder(path: str | Path) -> WholeFolder | None:
    """What a folder with a whole vision-language model is; None for any other, also for what can't be read."""
    path = Path(path)
    try:
        config = read_json_object(path / "config.json")
    except ValueError:  # which is said by whoever needs it
        return None
    model_type = config.get("model_type")
    if model_type == "composer_path":
        return WholeFolder(path, "composer_path", config)
    if model_type not in LLAVA_TYPES:
        return None
    if "text_config" in config:
        return WholeFolder(path, "llava-hf", config)
    return WholeFolder(path, "reference" if config.get("mm_vision_tower") == REFERENCE_TOWER else "llava", config)


def sections_of(path: str | Path, tower: str | None = None) -> dict[str, dict[str, Any]]:
    """What the sections of a YAML's `model` must say to start from a folder.

    Args:
        path: The folder.
        tower: Where the vision tower of a LLaVA lies whose folder has none; by default where its configuration says.

    Raises:
        ValueError: Another kind of folder, one that says what can't be built, or tensors that are nobody's.
    """
    if not Path(path).is_dir():
        raise ValueError(f"must be a folder with a whole vision-language model; there is no folder '{path}'")
    found = whole_folder(path)
    if found is None:
        said = read_json_object(Path(path, "config.json")).get("model_type")
        rule = "must be a folder with a whole vision-language model, one that export wrote or a LLaVA's"
        raise ValueError(
            f"'{path}' {rule}; found model_type {said!r:.60}; take such a folder, or name parts one by one"
        )
    shapes = found.names()
    if found.kind == "composer_path":
        sections = _own(found)
    elif found.kind == "llava-hf":
        vision = tower_keywords(found.path, _mapping(found, "vision_config"), _layer(found), found.config)
        check_tower_shapes(str(path), shapes, vision)
        sections = {"vision_encoder": vision, "projector": _stock_projector(found)}
    else:
        sections = _llava(found, shapes, tower)
    sections["vision_encoder"].setdefault("weights", str(path))
    sections["projector"]["weights"] = str(path)
    return sections | {"language_model": {"path": str(path)}}


def _own(found: WholeFolder) -> dict[str, dict[str, Any]]:
    config = checked_config(f"'{found.path}/config.json'", found.config)
    projector = {key: value for key, value in config["projector_config"].items() if key not in ("in_dim", "out_dim")}
    return {"vision_encoder": vision_keywords(config), "projector": projector}


def _stock_projector(found: WholeFolder) -> dict[str, Any]:
    act, bias = found.config.get("projector_hidden_act", "gelu"), found.config.get("multimodal_projector_bias", True)
    if act != "gelu" or bias is not True:
        raise ValueError(
            f"'{found.path}': its projector must have gelu and biases; found {act!r:.40} and biases {bias!r:.40}"
        )
    return {"type": "mlp2x_gelu"}


def _layer(found: WholeFolder) -> Any:
    old = found.kind == "llava"
    return found.config.get("mm_vision_select_layer" if old else "vision_feature_layer", -2)


def _llava(found: WholeFolder, shapes: dict[str, tuple[int, ...]], tower: str | None) -> dict[str, dict[str, Any]]:
    """LLaVA's own folder, or the reference's, whose vision tower may lie elsewhere."""
    config = found.config
    kind = config.get("mm_projector_type", "linear")
    projector: dict[str, Any] = {"type": kind} | ({"image_marks": True} if found.marks_images else {})
    if (query := shapes.get("model.mm_projector.attn_pool.query")) is not None and len(query) == 2:
        projector["pooler"] = {"kind": "reference", "num_queries": query[0], "dim": query[1], "num_heads": 8}
    inside = {found.part_of(name)[1]: shape for name, shape in shapes.items() if _is_tower(found, name)}  # type: ignore[index]
    if found.kind == "reference":
        return {"vision_encoder": _reference_tower(found, inside, tower), "projector": projector}
    place: Any = tower or config.get("mm_vision_tower")
    if not (isinstance(place, str) and (Path(place) / "config.json").is_file()):
        raise ValueError(
            f"'{found.path}': its vision tower must lie here; found only its name, {place!r:.80}; give "
            "model.vision_encoder.weights, a folder with that CLIP or SigLIP and its config.json"
        )
    said = read_json_object(Path(place, "config.json"))
    vision = said["vision_config"] if isinstance(said.get("vision_config"), dict) else said
    keywords = tower_keywords(Path(place), vision, _layer(found), _select(config), str(said.get("model_type")))
    check_tower_shapes(str(found.path if inside else place), inside or shapes_of_folder(Path(place)), keywords)
    return {"vision_encoder": keywords | ({} if inside else {"weights": place}), "projector": projector}


def _is_tower(found: WholeFolder, name: str) -> bool:
    return (found.part_of(name) or ("", ""))[0] == "vision_encoder"


def _select(config: dict[str, Any]) -> dict[str, Any]:
    """LLaVA's word for which tokens are taken, in transformers' words."""
    word = config.get("mm_vision_select_feature", "patch")
    return {"vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}.get(str(word), word)}


def _reference_tower(found: WholeFolder, inside: dict[str, Any], tower: str | None) -> dict[str, Any]:
    """The reference's ViT, from the shapes of its tensors; what no shape tells is as the reference has it."""
    keywords: dict[str, Any] = {"name": REFERENCE_TOWER, "tokens": "all"}
    file = tower or (str(found.path / TOWER_FILE) if (found.path / TOWER_FILE).is_file() else None)
    if not inside:
        if file is None:
            fix = f"give model.vision_encoder.weights, or put its {TOWER_FILE} there"
            raise ValueError(f"'{found.path}': its vision tower must be there; found none of its tensors; {fix}")
        return keywords | {"weights": file}
    patch, positions = inside.get("patch_embed.proj.weight"), inside.get("pos_embed")
    first = inside.get("blocks.0.mlp.fc1.weight")
    if patch is None or positions is None or first is None or len(patch) != 4 or len(positions) != 3:
        raise ValueError(f"'{found.path}': its vision tower must be a ViT of timm's; found other tensors")
    dim, side = patch[0], patch[-1]
    depth = 1 + max(int(key.split(".")[1]) for key in inside if re.match(r"blocks\.\d+\.", key))
    size = round((positions[1] - 1) ** 0.5) * side
    sizes = {"patch_size": side, "embed_dim": dim, "depth": depth, "mlp_ratio": first[0] / dim}
    usual = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "mlp_ratio": 4.0}
    if kwargs := {key: value for key, value in sizes.items() if value != usual[key]}:
        keywords["kwargs"] = kwargs
    return keywords | {"image_size": size}


def _mapping(found: WholeFolder, key: str) -> dict[str, Any]:
    value = found.config.get(key)
    if not isinstance(value, dict):
        rule = f"must have {key}, an object; found {type(value).__name__}"
        raise ValueError(f"'{found.path}/config.json': {rule}; take the file as it was written")
    return value
