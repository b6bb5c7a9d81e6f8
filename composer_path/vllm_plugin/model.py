"""The architecture in vLLM: our vision encoder and projector before vLLM's own language model of the same weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from composer_path.hugging_face.model_config import vision_keywords
from composer_path.models.parameters import cast_parameters
from composer_path.models.projector import untrained_projector
from composer_path.models.vision_encoder import untrained_vision_encoder
from composer_path.own_parts.registry import check_sources
from composer_path.vllm_plugin.inputs import ComposerPathDummyInputs, ComposerPathInfo, ComposerPathInputs
from composer_path.weights.tensor_file import check_tensors

OURS = ("vision_encoder", "projector")


@MULTIMODAL_REGISTRY.register_processor(ComposerPathInputs, info=ComposerPathInfo, dummy_inputs=ComposerPathDummyInputs)
class ComposerPathForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """Pictures and text in, text out; tensor names are those of an exported folder.

    Args:
        vllm_config: vLLM's, whose `hf_config` is the folder's.
        prefix: Of this module's names in a larger one.
    """

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config, self.multimodal_config = config, vllm_config.model_config.multimodal_config
        said, text = config.to_dict(), config.get_text_config()
        check_sources("the model's folder", said)
        self.configure_mm_token_handling(text.vocab_size, [config.image_token_id])
        dtype = vllm_config.model_config.dtype
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_encoder = built(untrained_vision_encoder, vision_keywords(said), dtype)
            self.projector = built(untrained_projector, said["projector_config"], dtype)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a picture in a prompt's text where the chat template has no place for it."""
        if modality == "image":
            return "<image>"
        raise ValueError(f"composer_path: pictures only, found '{modality}'; leave it out")

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """A picture's vectors in the language model's word space, for each of `pixel_values`."""
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is None or len(pixel_values) == 0:
            return []
        return self.projector(self.vision_encoder(pixel_values))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states; where images are, `inputs_embeds` has their vectors already."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Scores of the next token, never the image's: no answer holds it."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            logits[..., self.config.image_token_id] = float("-inf")
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take the folder's tensors, each by its name; returns those names as vLLM knows them.

        Raises:
            ValueError: A tensor of vision encoder or projector is missing, left over or of another shape.
        """
        ours: dict[str, Tensor] = {}

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                room, _, rest = name.partition(".")
                if room == "language_model":
                    yield rest, tensor
                elif room in OURS:  # vLLM also reads the folder's projector.safetensors, whose names say no room
                    ours[name] = tensor

        loaded = {f"language_model.{name}" for name in self.language_model.load_weights(others())}
        known = {name: tensor for name, tensor in self.state_dict().items() if name.split(".")[0] in OURS}
        check_tensors("the model's folder", known, ours)
        with torch.no_grad():
            for name, tensor in ours.items():
                known[name].copy_(tensor)
        return loaded | set(known)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which module is what, for vLLM's own adapters."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="projector", tower_model="vision_encoder"
        )


def built(build: Any, keywords: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A module of ours; what its checkpoint doesn't hold (positions' angles) stays as exact as it was made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        module: nn.Module = build(**keywords)
    finally:
        torch.set_default_dtype(before)
    cast_parameters(module, dtype)
    return module.eval().requires_grad_(False)
