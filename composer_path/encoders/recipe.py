"""A recipe: what it takes to build one public vision encoder, and where that was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Channels = tuple[float, float, float]

IMAGENET: tuple[Channels, Channels] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI: tuple[Channels, Channels] = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF: tuple[Channels, Channels] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Recipe:
    """One public encoder.

    Attributes:
        base: Its architecture by a name of timm's or open_clip's, as `model.vision_encoder.name` takes it.
        image_size: Side of the images that it was made for, pixels.
        patch_size: Side of a patch, pixels.
        normalization: Mean and std of its images, for pixels between 0 and 1.
        file: In which layout its public weights come.
        sources: Where all this was read: cards, papers, source files.
        kwargs: Keywords for the architecture, as in `model.vision_encoder.kwargs`.
        num_prefix_tokens: CLS and registers.
        num_parameters: As published, of the part that makes tokens; None where no source that was read says it.
    """

    base: str
    image_size: int
    patch_size: int
    normalization: tuple[Channels, Channels]
    file: str
    sources: tuple[str, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    num_prefix_tokens: int = 1
    num_parameters: int | None = None

    @property
    def num_tokens(self) -> int:
        """Of an image of its size, CLS and registers included."""
        return (self.image_size // self.patch_size) ** 2 + self.num_prefix_tokens
