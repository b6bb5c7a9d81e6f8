"""The model as transformers runs it: the parts of `PathMLLM`, on padded batches, with its generation and its cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from composer_path.hugging_face.configuration import WHERE, ComposerPathConfig
from composer_path.hugging_face.model_config import vision_keywords
from composer_path.images.pixels import normalize_image
from composer_path.models.language_model import load_language_model_config
from composer_path.models.language_types import (
    decoder_of,
    inputs_scale,
    longest_conversation,
    padded_attention,
    room_behind,
)
from composer_path.models.parameters import cast_parameters, empty_parameters
from composer_path.models.projector import untrained_projector
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR
from composer_path.models.vision_encoder import untrained_vision_encoder
from composer_path.own_parts.registry import check_sources
from composer_path.weights.tensor_file import WeightsError, some

# A cache's keyword in a language model's `forward`: the first until transformers 5.23, the second from then on.
CACHES = ("past_key_values", "cache")


class ComposerPathForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Vision encoder, projector and language model; tensors have the names that they have in `PathMLLM`.

    Args:
        config: Of an exported folder.
    """

    config_class = ComposerPathConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities: Any = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = _supports_cache_class = _supports_static_cache = True

    def __init__(self, config: ComposerPathConfig) -> None:
        super().__init__(config)
        check_sources(WHERE, {"imports": config.imports})
        said = config.to_dict()
        load_language_model_config(said["text_config"])  # refused where PathMLLM refuses it
        self._build_towers(said)
        text: Any = config.text_config
        wanted = text._attn_implementation
        if wanted is None or (wanted == "sdpa" and padded_attention(text) != "sdpa"):
            wanted = padded_attention(text)
        self.language_model = AutoModelForCausalLM.from_config(text, attn_implementation=wanted)
        self.config.text_config = self.language_model.config
        self.config.num_image_tokens = self.num_image_tokens()
        unsplit = {"VisionEncoder", type(self.projector).__name__, *(self.language_model._no_split_modules or ())}
        self._no_split_modules: Any = sorted(unsplit)
        self._skip_keys_device_placement = list(CACHES)
        if TRANSFORMERS_MAJOR < 5:  # which doesn't ask the language model
            tied = self.language_model._tied_weights_keys or ()
            self._tied_weights_keys: Any = [f"language_model.{key}" for key in tied]
        self.post_init()

    def _build_towers(self, said: dict[str, Any]) -> None:
        """Vision encoder and projector, whose buffers are real and fp32 whatever transformers builds with."""
        dtype, on_meta = torch.get_default_dtype(), torch.empty(0).is_meta
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu" if on_meta else torch.empty(0).device), empty_parameters(enabled=on_meta):
                self.vision_encoder = untrained_vision_encoder(**vision_keywords(said))
                self.projector = untrained_projector(**said["projector_config"])
        finally:
            torch.set_default_dtype(dtype)
        for tower in (self.vision_encoder, self.projector):
            cast_parameters(tower, dtype)
            for module in tower.modules():  # transformers 5 overwrites those that no file holds, see _init_weights
                names = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
                if names:
                    module.built_buffers = {name: module._buffers[name].clone() for name in names}  # type: ignore

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from files, or are random as each part draws them; only what no file holds is put back."""
        for name, value in getattr(module, "built_buffers", {}).items():
            module._buffers[name].copy_(value)  # type: ignore[union-attr]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder that an export or `save_pretrained` wrote; keywords are transformers'.

        Raises:
            WeightsError: Tensors are missing, left over or of other shapes, where transformers would only warn.
        """
        told = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # so that all of them are told, below
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        tied = {f"language_model.{key}" for key in getattr(model.language_model, "_tied_weights_keys", None) or ()}
        may_lack = tied if model.config.tie_word_embeddings else set()
        differences = {
            "missing": sorted(set(info["missing_keys"]) - may_lack),
            "left over": sorted(info["unexpected_keys"]),
            "other shapes": sorted(map(_in_words, info["mismatched_keys"])),
        }
        if problems := [f"{title} ({len(keys)}): {some(keys)}" for title, keys in differences.items() if keys]:
            raise WeightsError(f"weights: '{model.name_or_path}' doesn't fit the model. " + ". ".join(problems))
        return (model, info) if told else model

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The language model's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """The language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The language model without its head."""
        return decoder_of(self.language_model)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Images, uint8 or normalised, to vectors of the language model's width: (images, image tokens, width)."""
        encoder = self.vision_encoder
        pixel_values = pixel_values.to(next(encoder.parameters()).device)
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_image(pixel_values, mean=encoder.mean, std=encoder.std)
        return self.projector(encoder(pixel_values))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Word embeddings, with images' vectors where their token stands.

        Raises:
            ValueError: Another number of image tokens than of vectors.
        """
        embeds = self.get_input_embeddings()(input_ids)
        id, each = self.config.image_token_id, self.num_image_tokens()
        places = torch.zeros_like(input_ids, dtype=torch.bool) if id is None else input_ids == id
        num_images = 0 if pixel_values is None else len(pixel_values)
        count, expected = int(places.sum()), num_images * each
        if count != expected:
            if id is None:
                raise ValueError(
                    "the model's folder knows no image token: it is of version 1; export the model again to show images"
                )
            found = f"{num_images} images of {each} vectors each, {expected} in all"
            raise ValueError(
                f"{count} image tokens (id {id}) in the input for {found}; make both with the folder's processor"
            )
        if pixel_values is None or num_images == 0:
            return embeds
        vectors = self.get_image_features(pixel_values).flatten(0, 1) / inputs_scale(self.config.text_config)
        return embeds.masked_scatter(places[..., None].to(embeds.device), vectors.to(embeds.device, embeds.dtype))

    def num_image_tokens(self) -> int:
        """How many vectors an image of the encoder's size becomes."""
        size = self.vision_encoder.image_size
        return self.projector.num_image_tokens(self.vision_encoder.num_tokens(size, size))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_token_type_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the language model's own `forward` gives; `labels` are shifted there, and -100 is left out of the loss.

        1. Embed the text; encode and project the images; put their vectors in their token's place.
        2. Run the language model.

        Token types, which some processors give along, say nothing that the ids don't.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("the model needs input_ids or inputs_embeds: one of the two; found both or none")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, pixel_values)
        elif pixel_values is not None:
            raise ValueError("pixel_values go with input_ids; found inputs_embeds, where images stand already")
        if (held := past_key_values if cache is None else cache) is not None:
            known = inspect.signature(self.language_model.forward).parameters
            kwargs["cache" if "cache" in known else "past_key_values"] = held
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Transformers' own; an answer ends where the conversation is as long as those of training were.

        Raises:
            ValueError: A conversation is as long already.
        """
        limit = longest_conversation(self.config.text_config, self.config.max_seq_len)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        prompts = kwargs.get("inputs_embeds") if ids is None else ids
        if prompts is not None and limit is not None:
            mask = kwargs.get("attention_mask")
            lengths = torch.full(prompts.shape[:1], prompts.shape[1]) if mask is None else mask.sum(1).cpu()
            for length in lengths.tolist():
                room_behind(length, limit)
            full = _Full(lengths, 0 if ids is None else ids.shape[1], limit)
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()), full])
        return super().generate(inputs, generation_config, logits_processor, stopping_criteria, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> Any:
        """Several answers to each prompt: transformers would repeat each image, where a prompt's come after another."""
        images = model_kwargs.pop("pixel_values", None)
        parent: Any = super()
        ids, kept = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if images is None:
            return ids, kept
        if input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(1) // self.num_image_tokens()
            groups = images.split(counts.tolist()) if int(counts.sum()) == len(images) else [images]
            images = torch.cat([group for group in groups for _ in range(expand_size)])
        return ids, kept | {"pixel_values": images}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of a step: images go with the ids that hold their tokens, and with the first step."""
        held = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        first = held is None or held.get_seq_length() == 0
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("pixel_values", None)
        ids = inputs.get("input_ids")
        holds = (
            ids is not None
            and self.config.image_token_id is not None
            and bool((ids == self.config.image_token_id).any())
        )
        if pixel_values is not None and (first or holds):
            inputs["pixel_values"] = pixel_values
        return inputs


class _Full(StoppingCriteria):
    """Ends a row that is as long as the longest that was trained.

    Args:
        lengths: Tokens of each prompt, without what fills it up.
        start: How many columns of ids generation begins with.
        limit: Tokens of the longest.
    """

    def __init__(self, lengths: Tensor, start: int, limit: int) -> None:
        self.lengths, self.start, self.limit = lengths, start, limit

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Whether each row is full; several answers to a prompt stand below each other."""
        lengths = self.lengths.repeat_interleave(len(input_ids) // len(self.lengths))
        return (lengths + input_ids.shape[1] - self.start >= self.limit).to(input_ids.device)


def _in_words(mismatched: str | tuple[str, Any, Any]) -> str:
    """A tensor of another shape; transformers 4 tells its name only."""
    if isinstance(mismatched, str):
        return mismatched
    name, in_file, in_model = mismatched
    return f"{name}: the file has {list(in_file)}, the model {list(in_model)}"
