"""The base of vision encoders of one's own: what the rest has to know of a trunk that turns images into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from composer_path.images.pixels import IMAGE_MEAN, IMAGE_STD


class VisionTrunk(nn.Module):
    """What a trunk of one's own is derived from; its further keywords are `kwargs` of the YAML's `vision_encoder`.

    Args:
        image_size: Side of its square images, in pixels.
        patch_size: Side of a patch, in pixels: an image has (image_size / patch_size)² tokens beside the first ones.
        embed_dim: Width of the tokens.
        num_prefix_tokens: Tokens before the patches': CLS, then registers.

    Attributes:
        mean: Of images by channel, for pixels between 0 and 1; the YAML may say others.
        std: Likewise.
        blocks: Its transformer blocks, if it has some: FSDP and activation checkpointing take one at a time.
    """

    mean: ClassVar[Sequence[float]] = IMAGE_MEAN
    std: ClassVar[Sequence[float]] = IMAGE_STD

    def __init__(self, image_size: int, *, patch_size: int, embed_dim: int, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.embed_dim, self.num_prefix_tokens = embed_dim, num_prefix_tokens
        self.blocks: nn.Module | Sequence[nn.Module] = ()

    def forward_features(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images tokens dim"]:
        """All tokens of normalised images, in the weights' dtype; the class that is derived says how."""
        raise NotImplementedError
