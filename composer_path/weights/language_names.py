"""Names of a language model's tensors in a folder, as the model has them: known prefixes are taken off, others aren't.

Training programs wrap a model (DDP `module.`, torch.compile `_orig_mod.`, PEFT `base_model.model.`), and the folder of
a vision-language model holds its language model beside a vision tower.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from composer_path.weights.tensor_file import WeightsError, some

# Around a whole model; `model.` is a module that holds the model under this name.
AROUND = ("module.", "base_model.model.", "model.")
COMPILED = "_orig_mod."  # may stand inside a name
# Beside the language model, in folders of transformers' vision-language models.
BESIDE = re.compile(
    r"(model\.)?(vision_tower|vision_model|multi_modal_projector|mm_projector|image_newline|vision_encoder|projector)\b"
)
# Computed, not learned; old checkpoints hold them.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|\.position_ids)$")
ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
QUANTIZED = re.compile(r"\.(qweight|qzeros|scales|g_idx|weight_scale\w*|absmax|quant_map|SCB|\w+_(blocks|scales))$")


def names_in_model(names: Collection[str], embedding: str, decoder: str, wrapped: bool) -> dict[str, str]:
    """What each tensor of a folder is called in the model; those of a vision-language model's other parts are left out.

    Args:
        names: Those of the folder.
        embedding: The model's own name of its input embedding, such as `model.embed_tokens.weight`.
        decoder: What its decoder's names begin with, such as `model.`.
        wrapped: Whether the folder's configuration is a vision-language model's.

    Raises:
        WeightsError: Two of them would be called alike.
    """
    bare = embedding.removeprefix(decoder)
    # Prefixes in a folder and in the model, by the name that the embedding has there; the first that is there is taken.
    layouts = {
        embedding: {},
        f"language_model.{embedding}": {"language_model.": ""},
        f"model.language_model.{bare}": {"model.language_model.": decoder},
        f"{decoder}{embedding}": {decoder * 2: decoder},
        bare: {"": decoder},
    }
    ours = {name: name.replace(COMPILED, "") for name in names}
    while not any(layout in ours.values() for layout in list(layouts)[:3]):
        around = next((p for p in AROUND if ours and all(name.startswith(p) for name in ours.values())), None)
        if around is None:
            break
        ours = {name: now.removeprefix(around) for name, now in ours.items()}
    prefixes = next((prefixes for found, prefixes in layouts.items() if found in ours.values()), {})
    for theirs, own in prefixes.items():
        ours = {name: _renamed(now, theirs, own) for name, now in ours.items()}
    if wrapped:
        ours = {name: now for name, now in ours.items() if not BESIDE.match(now)}
    if len(set(ours.values())) < len(ours):
        alike = sorted(name for name, now in ours.items() if list(ours.values()).count(now) > 1)
        raise WeightsError(
            f"holds tensors that are called alike in the model: {some(alike)}; take a whole model's folder"
        )
    return ours


def _renamed(name: str, theirs: str, own: str) -> str:
    """A name with another prefix; a head, where all but it lack one, has none."""
    if not name.startswith(theirs) or (not theirs and name.startswith(("lm_head.", "embed_out."))):
        return name
    return own + name.removeprefix(theirs)


def kind_of(names: Iterable[str]) -> str | None:
    """What a folder's tensors are, where they aren't a model's weights: `adapter` or `quantized`."""
    names = list(names)
    if any(ADAPTER.search(name) for name in names):
        return "adapter"
    return "quantized" if any(QUANTIZED.search(name) for name in names) else None
