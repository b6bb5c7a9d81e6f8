"""Which library wrote a file of vision weights, and where in it the ViT is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from composer_path.weights import vision_names as names
from composer_path.weights import vision_positions as positions
from composer_path.weights.tensor_file import WeightsError, some
from composer_path.weights.vision_names import Tensors
from composer_path.weights.vision_positions import Resampling

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """How one library names the parts of a ViT.

    Attributes:
        library: In words.
        anchor: A key that every such file has; what stands before it in the file is the prefix of all keys.
        marks: Patterns of further keys behind the prefix; one of them must be there, where there are any.
        to_timm: Renames the tensors behind the prefix.
        resampling: How it resamples positions.
        left_out: A pattern of keys that no token depends on: classifier, pooling, mask token, buffers.
        class_in_positions: Whether the first position is that of CLS and registers have none; timm's own files are as
            its model is.
    """

    library: str
    anchor: str
    marks: tuple[str, ...]
    to_timm: Callable[[Tensors], Tensors]
    resampling: Resampling
    left_out: str
    class_in_positions: bool = True


class Found(NamedTuple):
    """The ViT of a file: its tensors by the file's names less the prefix, and what the file holds beside it."""

    layout: Layout
    prefix: str
    tensors: Tensors
    beside: list[str]


BEHIND_TIMM = r"(head|head_dist|fc_norm|attn_pool|pre_logits)\."
BEHIND_EVA = rf"{BEHIND_TIMM}|(.*\.)?rope\.(?!freqs$).*|mask_token$|lm_head\."
BEHIND_DINO = r"(head|dino_head|ibot_head|local_cls_norm)\.|mask_token$|rope_embed\.periods$|.*\.bias_mask$"
BEHIND_HF = r"pooler\.|classifier\.|head\.|embeddings\.(mask_token|position_ids)$|rope_embeddings\."

# In the order in which they are tried: a mark tells a layout from those below it that share its anchor.
LAYOUTS = (
    Layout(
        "transformers' DINOv3ViT",
        "embeddings.patch_embeddings.weight",
        (),
        names.from_hugging_face_dinov3,
        positions.PLAIN_BICUBIC,
        BEHIND_HF,
    ),
    Layout(
        "transformers' Dinov2 with registers",
        "embeddings.patch_embeddings.projection.weight",
        (r"embeddings\.register_tokens",),
        names.from_hugging_face_vit,
        positions.ANTIALIASED,
        BEHIND_HF,
    ),
    Layout(
        "transformers' ViT or Dinov2",
        "embeddings.patch_embeddings.projection.weight",
        (),
        names.from_hugging_face_vit,
        positions.PLAIN_BICUBIC,
        BEHIND_HF,
    ),
    Layout(
        "transformers' CLIP or SigLIP",
        "embeddings.patch_embedding.weight",
        (),
        names.from_hugging_face_clip,
        positions.PLAIN_BICUBIC,
        BEHIND_HF,
    ),
    Layout(
        "torchscale's BEiT-3",
        "vision_embed.proj.weight",
        (r"encoder\.layers\.0\.self_attn\.q_proj\.A\.weight",),
        names.from_beit3,
        positions.PLAIN_BICUBIC,
        r"text_embed\.|vision_embed\.mask_token$|(.*\.)?(?:B)\..*",
    ),
    Layout(
        "open_clip",
        "conv1.weight",
        (r"class_embedding",),
        names.from_open_clip,
        positions.ANTIALIASED,
        r"proj$|attn_pool\.|attn_pool_contrastive\.",
    ),
    Layout(
        "the DINOv3 repository",
        "patch_embed.proj.weight",
        (r"storage_tokens",),
        names.from_dinov3,
        positions.ANTIALIASED,
        BEHIND_DINO,
    ),
    Layout(
        "EVA-02",
        "patch_embed.proj.weight",
        (r"blocks\.0\.attn\.(q_bias|inner_attn_ln\..*)", r"blocks\.0\.mlp\.(w1|ffn_ln|fc1_g)\..*", r"(.*\.)?rope\..*"),
        names.from_eva,
        positions.ANTIALIASED,
        BEHIND_EVA,
        class_in_positions=False,
    ),
    Layout(
        "the DINOv2 repository, with registers",
        "patch_embed.proj.weight",
        (r"register_tokens",),
        names.from_dinov2,
        positions.ANTIALIASED,
        BEHIND_DINO,
    ),
    Layout(
        "the DINOv2 repository",
        "patch_embed.proj.weight",
        (r"mask_token", r"blocks\.\d+\.\d+\.norm1\.weight", r"blocks\.0\.mlp\.w12\.weight"),
        names.from_dinov2,
        positions.DINO_OFFSET,
        BEHIND_DINO,
    ),
    Layout(
        "timm",
        "patch_embed.proj.weight",
        (),
        dict,
        positions.ANTIALIASED,
        BEHIND_TIMM,
        class_in_positions=False,
    ),
)
# What may stand beside a ViT in a file: text towers, poolers, heads of training, language models. Under `visual` all
# else is the rest of a vision-language model, whose names differ from library to library.
BESIDE = re.compile(
    r"(module\.)?(model\.)?("
    r"text_model\.|text_projection|visual_projection\.|logit_scale$|logit_bias$|language_model\.|lm_head\."
    r"|multi_modal_projector\.|classifier\.|attn_pool_contrast\.|ln_contrast\.|vision_head\.|language_head\."
    r"|(teacher\.)?(dino_head|ibot_head|dino_loss|ibot_patch_loss)\.|student\.|head\.).*"
)


def find_vit(source: str, tensors: Tensors) -> Found:
    """The ViT in a file, and who wrote it so.

    Of a teacher and a student, as self-supervised training keeps them, the teacher is taken.

    Raises:
        WeightsError: No ViT, several, or tensors beside it that belong to nothing known.
    """
    layout, prefixes = _first_layout(tensors)
    if layout is None:
        raise WeightsError(
            f"weights: '{source}' has no key that ends with '{LAYOUTS[-1].anchor}', 'conv1.weight' or another patch "
            f"embedding, so it holds no ViT of this kind; it begins with {sorted(tensors)[:5]}"
        )
    if len(prefixes) > 1:
        teachers = [prefix for prefix in prefixes if "teacher" in prefix.split(".")]
        if len(teachers) != 1 or any({"teacher", "student"}.isdisjoint(prefix.split(".")) for prefix in prefixes):
            raise WeightsError(f"weights: '{source}' holds several ViTs, under {prefixes}; save the one to use alone")
        prefixes = teachers
    prefix = prefixes[0]
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    beside = sorted(key for key in tensors if not key.startswith(prefix))
    if "visual" not in prefix.split(".") and (unknown := [key for key in beside if not BESIDE.fullmatch(key)]):
        raise WeightsError(f"weights: '{source}' doesn't fit. Left over outside of '{prefix}': {some(unknown)}")
    if _is_conch(prefix, beside):
        own = positions.CONCH if prefix.endswith("visual.trunk.") else positions.CONCH_V1_5
        layout = layout._replace(library="CONCH", resampling=own)
    return Found(layout, prefix, inside, beside)


def _first_layout(tensors: Tensors) -> tuple[Layout | None, list[str]]:
    """The first layout whose anchor and marks are there, and the prefixes under which its ViTs stand."""
    for layout in LAYOUTS:
        prefixes = sorted(key.removesuffix(layout.anchor) for key in tensors if f".{key}".endswith(f".{layout.anchor}"))
        if any(_marked(layout, prefix, tensors) for prefix in prefixes):
            return layout, prefixes
    return None, []


def _marked(layout: Layout, prefix: str, keys: Collection[str]) -> bool:
    behind = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    return not layout.marks or any(re.fullmatch(mark, key) for mark in layout.marks for key in behind)


def _is_conch(prefix: str, beside: list[str]) -> bool:
    """CONCH keeps its poolers beside the trunk, under names of its own."""
    return prefix.endswith("trunk.") and any("attn_pool_contrast." in key for key in beside)
