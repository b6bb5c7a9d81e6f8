"""Stain jitter: vary how strongly haematoxylin and eosin stained a tile, as laboratories and scanners do.

Light through stained tissue falls off exponentially, so stains add up in optical density. Each image's density is
unmixed into stains with a fixed matrix, each stain is scaled and shifted a little, and the mixture is made a picture
again (Tellez et al., Medical Image Analysis 58, 2019). The matrix is Ruifrok and Johnston's (Anal Quant Cytol Histol
23, 2001); nothing is estimated from the image, so a blank tile can't fail.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from composer_path.algorithms.image_algorithm import ImageAlgorithm
from composer_path.batches.batch import Batch

# Rows: haematoxylin, eosin, DAB (here: what the first two leave over). Columns: density in red, green, blue.
_STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]], dtype=torch.float64)
_STAINS = _STAINS / _STAINS.norm(dim=1, keepdim=True)
# [stain, colour in, colour out]: unmixing and keeping only this stain, as one 3 x 3 matrix.
_STAIN_PARTS = torch.einsum("is,so->sio", torch.linalg.inv(_STAINS), _STAINS).float()

_LOG2_OF_10 = 3.321928094887362


def jitter_stain(
    images: UInt8[Tensor, "images 3 height width"], alpha: Float[Tensor, "images 3"], beta: Float[Tensor, "images 3"]
) -> UInt8[Tensor, "images 3 height width"]:
    """Scale each stain of each image (haematoxylin, eosin, the rest) by `alpha` and add `beta`, in optical density.

    1. Density = log10(256 / (pixel + 1)): 0 for white, 2.4 for black, finite everywhere.
    2. Unmix, scale and mix again: one 3 x 3 product a pixel, and a shift that is the same for all pixels.
    3. Pixel = 256 / 10**density - 1, rounded, kept within 0 and 255.

    `alpha` 1 and `beta` 0 give the images back exactly.
    """
    parts, colors = (table.to(images.device, non_blocking=True) for table in (_STAIN_PARTS, _STAINS.float()))
    # Products of single numbers rather than matrix kernels, whose rounding depends on the number of images
    # (and on whether TF32 is on): the same image must come out the same in any microbatch.
    matrix = (alpha[:, :, None, None] * parts).sum(dim=1)  # [images, in, out]
    shift = (beta[:, :, None] * colors).sum(dim=1)  # [images, out]

    # In powers of two: exact for white, and cheap to undo.
    density = (images.float() + 1).log2_().sub_(8).neg_()
    jittered = (shift * _LOG2_OF_10)[:, :, None, None] + matrix[:, 0, :, None, None] * density[:, 0:1]
    for channel in (1, 2):
        jittered.addcmul_(matrix[:, channel, :, None, None], density[:, channel : channel + 1])
    return jittered.neg_().add_(8).exp2_().sub_(1).round_().clamp_(0, 255).to(torch.uint8)


class StainJitter(ImageAlgorithm):
    """Jitter the stains of H&E images; other stains and images of unknown stain stay as they are.

    Args:
        strength: Each stain's amount is multiplied by a factor from 1 - strength to 1 + strength: 0.1 is hardly seen,
            0.3 is a clearly different staining.
        shift: A density (decadic absorbance) from -shift to shift is added to each stain everywhere, the slide's white
            included: 0.01 takes up to 13 of white's 255 grey levels.
        probability: The share of H&E images that are jittered.
        seed: Another seed gives another jitter.
    """

    num_draws = 1 + 2 * len(_STAINS)

    def __init__(self, strength: float = 0.2, shift: float = 0.01, probability: float = 0.8, seed: int = 17) -> None:
        super().__init__(seed, strength=strength, shift=shift, probability=probability)
        self.strength, self.shift, self.probability = strength, shift, probability

    def change(
        self,
        images: UInt8[Tensor, "images 3 height width"],
        draws: Float[Tensor, "images draws"],
        batch: Batch,
    ) -> UInt8[Tensor, "images 3 height width"]:
        """Jitter those that the first number chooses."""
        chosen = batch.is_he & (draws[:, 0] < self.probability)
        scales, shifts = (draws[:, 1:] * 2 - 1).split(len(_STAINS), dim=1)
        alpha, beta = 1 + self.strength * scales, self.shift * shifts
        return torch.where(chosen[:, None, None, None], jitter_stain(images, alpha, beta), images)
