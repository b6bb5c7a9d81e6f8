"""Whole model folders in the reference's names: read into a PathMLLM, and written back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_path.models.attention import AttentionBackend
from composer_path.models.language_model import LLAMA_KEYS, untrained_language_model
from composer_path.models.parameters import empty_parameters
from composer_path.models.projector import NUM_MARKS, Projector, untrained_projector
from composer_path.models.rope_keys import old_rope_keys
from composer_path.models.vision_encoder import VisionEncoder, untrained_vision_encoder
from composer_path.models.vocabulary_rows import with_mean_rows
from composer_path.weights.folder import write_folder
from composer_path.weights.model_folder import PathMLLM
from composer_path.weights.projector_names import MARKER, WORDS, from_reference_projector, to_reference_projector
from composer_path.weights.tensor_file import WeightsError, read_tensor_folder

VISION_PREFIX = "model.vision_tower.vision_tower."
PROJECTOR_PREFIX = "model." + MARKER
EMBEDDING = "model." + WORDS
TRUNK = "vision_encoder.trunk."
VISION_TOWER = "coca_vit-l"
MODEL_TYPE = "llava"
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # computed, not learned; old checkpoints hold it
OURS = "use PathMLLM.save_pretrained"
POOLER_HEADS = 8  # fixed in the reference, not visible in any shape


def load_reference_model(
    folder: str | Path,
    *,
    image_size: int = 448,
    patch_size: int = 16,
    num_heads: int = 16,
    attention: AttentionBackend = "auto",
    dtype: torch.dtype | None = None,
) -> PathMLLM:
    """A PathMLLM from a folder that the reference's training wrote.

    Widths, depths and the number of queries are read from the tensors, the language model's architecture from
    `config.json`. What neither shows is given; the defaults are the reference's.

    Args:
        folder: With `config.json` and safetensors or `pytorch_model*.bin`.
        image_size: Side of the images, in pixels.
        patch_size: Side of a patch, in pixels.
        num_heads: Attention heads of the ViT.
        attention: Backend of the language model, see `composer_path.models.attention.resolve_attention`.
        dtype: Of the weights; as they are in the files by default.

    Raises:
        WeightsError: Another kind of folder, or tensors that are missing, left over or of other shapes (all listed).
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = {key: value for key, value in read_tensor_folder(folder).items() if not IGNORED.search(key)}
    state_dict = from_reference(tensors, marked=bool(config.get("mm_use_im_start_end")))
    with empty_parameters():
        language_config = {key: value for key, value in config.items() if key in LLAMA_KEYS and value is not None}
        model = PathMLLM(
            _empty_vision_encoder(folder, state_dict, image_size, patch_size, num_heads),
            _empty_projector(folder, state_dict, config),
            untrained_language_model({"model_type": "llama", **language_config}, attention=attention),
        )
    return model.filled(str(folder), state_dict, dtype)


def save_reference_model(
    model: PathMLLM,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: str = "5GB",
    more_config: Mapping[str, Any] | None = None,
    mark_id: int | None = None,
) -> None:
    """Write a PathMLLM as a folder in the reference's names; the way back of `load_reference_model`.

    Args:
        model: With the reference's parts: `coca_vit-l`, a bias-free pooler or none, LLaMA.
        folder: Made if it isn't there.
        state_dict: The gathered weights where `model` is sharded; its own by default.
        max_shard_size: Of one safetensors file.
        more_config: Further keys of `config.json`, or others in place of these.
        mark_id: Of the word before an image, where there are marks; the other one's is the next. By default they are
            added to the words that there are.

    Raises:
        WeightsError: A part that the reference has no names for.
    """
    vision, projector = model.vision_encoder.config, model.projector.config
    language_config: Any = model.language_model.config
    if "mlp" not in projector:
        raise WeightsError(f"the reference's format has no place for: projector '{projector.get('type')}'; {OURS}")
    pooler, depth = projector["pooler"], projector["mlp"]["depth"]
    unknown = []
    if vision["name"] != VISION_TOWER or vision["tokens"] != "all":
        unknown.append(f"vision encoder '{vision['name']}' with tokens '{vision['tokens']}'")
    if pooler is not None and (pooler["kind"] != "reference" or pooler["num_heads"] != POOLER_HEADS):
        unknown.append(f"pooler {pooler}")
    if language_config.model_type != "llama":
        unknown.append(f"language model '{language_config.model_type}'")
    if unknown:
        raise WeightsError(f"the reference's format has no place for: {', '.join(unknown)}; {OURS}")
    mlp = {0: "identity", 1: "linear"}.get(depth, f"mlp{depth}x_gelu")
    tensors = to_reference(model.state_dict() if state_dict is None else state_dict, mark_id)
    if language_config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    config = json.loads(language_config.to_json_string(use_diff=False))
    config |= old_rope_keys(config.pop("rope_parameters", None) or {})  # the reference runs on transformers 4
    config["vocab_size"] = len(tensors["model.embed_tokens.weight"])
    config |= {
        "model_type": MODEL_TYPE,
        "architectures": ["LlavaLlamaForCausalLM"],
        "use_mm_proj": True,
        "mm_vision_tower": VISION_TOWER,
        "mm_projector_type": f"{'attn_pool+' if pooler else ''}{mlp}",
        "mm_hidden_size": pooler["dim"] if pooler else projector["in_dim"],
        "mm_context_size": projector["in_dim"],
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": model.projector.marks is not None,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
        **(more_config or {}),
    }
    write_folder(Path(folder), config, tensors, max_shard_size)


def to_reference(state_dict: Mapping[str, Tensor], mark_id: int | None = None) -> dict[str, Tensor]:
    """A PathMLLM's tensors under the reference's names; marks around images become words, the last ones.

    In the head such a word is the mean of the others, as it begins there: nothing learns to say it.
    """
    tensors = to_reference_projector(_under("projector.", state_dict), PROJECTOR_PREFIX)
    marks = tensors.pop(EMBEDDING, None)
    tensors |= {VISION_PREFIX + key: tensor for key, tensor in _under(TRUNK, state_dict).items()}
    tensors |= _under("language_model.", state_dict)
    if marks is not None:
        first = len(tensors[EMBEDDING]) if mark_id is None else mark_id
        for name in (EMBEDDING, "lm_head.weight"):
            if (rows := tensors.get(name)) is not None:
                tensors[name] = with_mean_rows(rows[:first], max(0, first - len(rows)) + NUM_MARKS)
        tensors[EMBEDDING][-NUM_MARKS:] = marks.to(tensors[EMBEDDING].dtype)
    return tensors


def from_reference(tensors: Mapping[str, Tensor], marked: bool = False) -> dict[str, Tensor]:
    """The reference's tensors under a PathMLLM's names; where images are `marked`, their marks are its last words."""
    projector = from_reference_projector(_under(PROJECTOR_PREFIX, tensors))
    if marked and EMBEDDING in tensors:
        projector["marks"] = tensors[EMBEDDING][-NUM_MARKS:].clone()
    others = {key: tensor for key, tensor in tensors.items() if not key.startswith((PROJECTOR_PREFIX, VISION_PREFIX))}
    return (
        {f"projector.{key}": tensor for key, tensor in projector.items()}
        | {TRUNK + key: tensor for key, tensor in _under(VISION_PREFIX, tensors).items()}
        | {f"language_model.{key}": tensor for key, tensor in others.items()}
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose keys begin so, without the beginning."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise WeightsError(f"weights: no config.json in '{folder}'; it must be a model folder of the reference's")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != MODEL_TYPE or config.get("mm_vision_tower") != VISION_TOWER:
        raise WeightsError(
            f"'{folder}/config.json' must have model_type '{MODEL_TYPE}' and mm_vision_tower '{VISION_TOWER}', found "
            f"'{config.get('model_type')}' and '{config.get('mm_vision_tower')}'"
        )
    return config


def _empty_vision_encoder(
    folder: Path, state_dict: Mapping[str, Tensor], image_size: int, patch_size: int, num_heads: int
) -> VisionEncoder:
    """The ViT that the tensors' shapes describe."""
    trunk = _under(TRUNK, state_dict)
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if key not in trunk:
            raise WeightsError(f"weights: '{folder}' has no '{VISION_PREFIX}{key}', so its ViT isn't in it")
    dim, _, side, _ = trunk["patch_embed.proj.weight"].shape
    num_positions = trunk["pos_embed"].shape[1]
    expected = (image_size // patch_size) ** 2 + 1
    if side != patch_size or expected != num_positions:
        raise WeightsError(
            f"weights: the ViT in '{folder}' has patches of {side} px and {num_positions} position embeddings (CLS "
            f"included), but image_size {image_size} and patch_size {patch_size} make {expected}"
        )
    if dim % num_heads:
        raise WeightsError(f"weights: num_heads {num_heads} doesn't divide the ViT's width {dim} in '{folder}'")
    depth = 1 + max(int(key.split(".")[1]) for key in trunk if key.startswith("blocks."))
    kwargs: dict[str, Any] = {"patch_size": patch_size, "embed_dim": dim, "depth": depth, "num_heads": num_heads}
    kwargs["mlp_ratio"] = trunk["blocks.0.mlp.fc1.weight"].shape[0] / dim
    return untrained_vision_encoder(VISION_TOWER, image_size=image_size, kwargs=kwargs)


def _empty_projector(folder: Path, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Projector:
    """The projector that the tensors' shapes and the config's `mm_projector_type` describe."""
    pooler = None
    if (query := state_dict.get("projector.pooler.query")) is not None:
        pooler = {"kind": "reference", "num_queries": query.shape[0], "dim": query.shape[1], "num_heads": POOLER_HEADS}
    widths = {"in_dim": state_dict[f"{TRUNK}patch_embed.proj.weight"].shape[0], "out_dim": config["hidden_size"]}
    try:
        marks = bool(config.get("mm_use_im_start_end"))
        kind = config.get("mm_projector_type", "linear")
        return untrained_projector(**widths, type=kind, pooler=pooler, image_marks=marks)
    except ValueError as error:
        raise WeightsError(f"weights: the projector in '{folder}' can't be built. {error}") from error
