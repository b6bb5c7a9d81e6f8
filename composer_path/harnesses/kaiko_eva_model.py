"""An exported model in kaiko-eva: its own Hugging Face wrapper, with the settings that our folders need."""

from __future__ import annotations

from typing import Any

from eva.multimodal.models.wrappers import HuggingFaceModel
from torchvision.transforms.v2.functional import to_pil_image

import composer_path  # noqa: F401  # transformers then knows config, processor and model


class ComposerPathModel(HuggingFaceModel):
    """The model of a folder that `composer-path export` wrote; pictures stand before the question, as in training.

    Args:
        model_name_or_path: The folder.
        system_prompt: Before every question, instead of the template's system message.
        model_kwargs: Of transformers' `from_pretrained`, such as `dtype` or `device_map`.
        generation_kwargs: Of its `generate`; greedy by default.
    """

    def __init__(
        self,
        model_name_or_path: str,
        system_prompt: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        generation_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model_name_or_path,
            "AutoModelForImageTextToText",
            model_kwargs=model_kwargs,
            system_prompt=system_prompt,
            generation_kwargs=generation_kwargs,
            image_key="images",
            image_position="before_text",
        )

    def configure_model(self) -> None:
        """Load model and processor; questions of a batch are filled up at the left, as answers need it."""
        super().configure_model()
        self.processor_kwargs = {"padding": True}

    def format_inputs(self, batch: Any) -> Any:
        """The batch as the processor makes it, from Pillow's pictures."""
        if getattr(batch, "images", None) is not None:
            batch = batch._replace(images=[[to_pil_image(one) for one in some] for some in batch.images])
        return super().format_inputs(batch)
