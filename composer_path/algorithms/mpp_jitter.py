"""MPP jitter: a tile as another scanner's resolution, in micrometres per pixel, would show it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from composer_path.algorithms.image_algorithm import ImageAlgorithm
from composer_path.batches.batch import Batch


def zoom(
    images: UInt8[Tensor, "images 3 height width"], factors: Float[Tensor, " images"]
) -> UInt8[Tensor, "images 3 height width"]:
    """Enlarge each image about its centre by a factor; below 1 what lies beyond the border is its reflection.

    Bilinear, without smoothing: for factors near 1.
    """
    height, width = images.shape[2:]
    rows, columns = (
        torch.linspace(1 / size - 1, 1 - 1 / size, size, device=images.device)[None] / factors[:, None]
        for size in (height, width)
    )
    shape = (len(images), height, width)
    grid = torch.stack([columns[:, None].expand(shape), rows[:, :, None].expand(shape)], dim=3)
    zoomed = F.grid_sample(images.float(), grid, "bilinear", "reflection", align_corners=False)
    return zoomed.round_().clamp_(0, 255).to(torch.uint8)


class MppJitter(ImageAlgorithm):
    """Enlarge or shrink images by up to a factor, as if they were scanned at another resolution.

    Images whose text speaks of magnification, resolution or lengths (`composer_path.records.wording`) stay as they are.

    Args:
        strength: The factor lies between 1 / (1 + strength) and 1 + strength; both are equally likely. 0.1 covers what
            scanners of one nominal magnification differ by (0.23 to 0.27 micrometres at 40x).
        probability: The share of images that are changed.
        seed: Another seed gives other factors.
    """

    num_draws, drawn_as = 2, "mpp_jitter"

    def __init__(self, strength: float = 0.1, probability: float = 0.5, seed: int = 17) -> None:
        super().__init__(seed, strength=strength, probability=probability)
        self.strength, self.probability = strength, probability

    def change(
        self,
        images: UInt8[Tensor, "images 3 height width"],
        draws: Float[Tensor, "images draws"],
        batch: Batch,
    ) -> UInt8[Tensor, "images 3 height width"]:
        """Zoom those that are chosen."""
        chosen = ~batch.names_size & (draws[:, 0] < self.probability)
        factors = torch.exp((draws[:, 1] * 2 - 1) * math.log1p(self.strength))
        return torch.where(chosen[:, None, None, None], zoom(images, factors), images)
