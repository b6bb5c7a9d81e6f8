"""A whole model's tensors by our names, whatever its folder calls them."""

from __future__ import annotations

import re

from torch import Tensor

from composer_path.weights.tensor_file import read_tensor_folder
from composer_path.weights.vision_layout import find_vit
from composer_path.weights.whole_folder import WholeFolder


def our_tensors(folder: WholeFolder) -> dict[str, Tensor]:
    """All of them; queries, keys and values of a tower in one tensor, as our encoder has them.

    Raises:
        WeightsError: Tensors that are nobody's, or parts that aren't there.
    """
    if folder.kind == "composer_path":
        folder.names()
        return read_tensor_folder(folder.path)
    language = {_language_name(name): value for name, value in folder.tensors_of("language_model", whole=True).items()}
    projector = {f"projector.{name}": value for name, value in folder.projector().items()}
    found = find_vit(str(folder.path), folder.tensors_of("vision_encoder"))
    vision = {f"vision_encoder.trunk.{name}": value for name, value in found.layout.to_timm(found.tensors).items()}
    return vision | projector | language


def _language_name(name: str) -> str:
    """`model.language_model.layers…`, `language_model.model.layers…` and `model.layers…` are all one."""
    bare = re.sub(r"^(model\.language_model|language_model\.model|model)\.|^language_model\.(?=lm_head)", "", name)
    return f"language_model.{bare}" if bare.startswith("lm_head.") else f"language_model.model.{bare}"
