"""From a prompt's ids and pictures to what the model reads in vLLM: one image token becomes all of an image's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)


class ComposerPathInfo(BaseProcessingInfo):
    """What a prompt may hold, as the folder's configuration says."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images; what a prompt may take is said by `--limit-mm-per-prompt`."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """All pictures take as many tokens."""
        return {"image": self.get_hf_config().num_image_tokens}


class ComposerPathDummyInputs(BaseDummyInputsBuilder[ComposerPathInfo]):
    """White pictures, by which vLLM measures what memory it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A prompt of nothing but images."""
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Those pictures."""
        side = self.info.get_hf_config().vision_config.image_size
        number = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=side, height=side, num_images=number)}


class ComposerPathInputs(BaseMultiModalProcessor[ComposerPathInfo]):
    """Pictures by the folder's image processor, ids as they come: they are vLLM's or ours, and stay what they are."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As vLLM does it; ids where each image has all of its tokens already (ours) are taken as well.

        Raises:
            ValueError: The ids hold another number of images than there are pictures.
        """
        image_token, width = self._image_token()
        ids = list(inputs.prompt)
        found, pictures = ids.count(image_token), inputs.mm_data_items.get_all_counts().get("image", 0)
        if found == pictures * width != pictures:
            inputs = replace(inputs, prompt=one_token_each(ids, image_token, width))
        elif found != pictures:
            raise ValueError(
                f"prompt for composer_path: as many image tokens (id {image_token}) as pictures, or {width} for each; "
                f"found {found} for {pictures}; give a picture for each, and no image token in a text"
            )
        return super().apply(inputs, timing_ctx)

    def _image_token(self) -> tuple[int, int]:
        config = self.info.get_hf_config()
        return config.image_token_id, config.num_image_tokens

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> Any:
        """Only pictures come here: no text."""
        processor = self.info.get_hf_processor(**hf_kwargs)
        return self.info.ctx.call_hf_processor(processor.image_processor, hf_data, hf_kwargs)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        image_token, width = self._image_token()
        return [PromptReplacement(modality="image", target=[image_token], replacement=[image_token] * width)]


def one_token_each(ids: Sequence[int], image_token: int, width: int) -> list[int]:
    """Ids with one token for each image in place of `width` of them.

    Raises:
        ValueError: A run of image tokens isn't whole images.
    """
    short: list[int] = []
    run = 0
    for place, id in enumerate([*ids, None]):
        if id == image_token:
            run += 1
            continue
        if run % width:
            raise ValueError(
                f"prompt for composer_path: an image takes {width} tokens in a row; found a run of {run} before "
                f"token {place}; leave the ids as the processor makes them"
            )
        short += [image_token] * (run // width)
        run = 0
        if id is not None:
            short.append(id)
    return short
