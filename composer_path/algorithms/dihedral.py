"""Dihedral: a tile of tissue in any of its eight orientations, as a slide has no up."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from composer_path.algorithms.image_algorithm import ImageAlgorithm
from composer_path.batches.batch import Batch


def orient(
    images: UInt8[Tensor, "images 3 side side"], orientations: Int64[Tensor, " images"]
) -> UInt8[Tensor, "images 3 side side"]:
    """Turn each image by so many quarters (0 to 3), and mirror it from 4 on. Pixels move; none changes."""
    for bit, turned in ((1, _quarter), (2, _half), (4, _mirror)):
        chosen = (orientations & bit) > 0
        images = torch.where(chosen[:, None, None, None], turned(images), images)
    return images


def _quarter(images: Tensor) -> Tensor:
    return images.transpose(2, 3).flip(2)


def _half(images: Tensor) -> Tensor:
    return images.flip((2, 3))


def _mirror(images: Tensor) -> Tensor:
    return images.flip(3)


class Dihedral(ImageAlgorithm):
    """Show images in one of eight orientations: four quarter turns, mirrored or not.

    Images of a sample are turned alike. Those whose text speaks of a direction (left, upper, arrow, 3 o'clock, see
    `composer_path.records.wording`) stay as they are; what is written into an image isn't read.

    Args:
        probability: The share of samples that get one of the eight, the given one among them.
        seed: Another seed gives other orientations.
    """

    num_draws, drawn_as, of_a_sample = 2, "dihedral", True

    def __init__(self, probability: float = 1.0, seed: int = 17) -> None:
        super().__init__(seed, probability=probability)
        self.probability = probability

    def change(
        self,
        images: UInt8[Tensor, "images 3 height width"],
        draws: Float[Tensor, "images draws"],
        batch: Batch,
    ) -> UInt8[Tensor, "images 3 height width"]:
        """Turn those that are chosen."""
        chosen = ~batch.names_direction & (draws[:, 0] < self.probability)
        return orient(images, (draws[:, 1] * 8).long() * chosen)
