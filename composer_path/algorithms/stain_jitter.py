"""Stain jitter: vary how strongly haematoxylin and eosin stained a tile, as laboratories and scanners do.

Light through stained tissue falls off exponentially, so stains add up in optical density. Each image's density is
unmixed into stains with a fixed matrix, each stain is scaled and shifted a little, and the mixture is made a picture
again (Tellez et al., Medical Image Analysis 58, 2019). The matrix is Ruifrok and Johnston's (Anal Quant Cytol Histol
23, 2001); nothing is estimated from the image, so a blank tile can't fail.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from composer_path.batches.batch import Batch

# Rows: haematoxylin, eosin, DAB (here: what the first two leave over). Columns: density in red, green, blue.
_STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]], dtype=torch.float64)
_STAINS = _STAINS / _STAINS.norm(dim=1, keepdim=True)
# [stain, colour in, colour out]: unmixing and keeping only this stain, as one 3 x 3 matrix.
_STAIN_PARTS = torch.einsum("is,so->sio", torch.linalg.inv(_STAINS), _STAINS).float()

_LOG2_OF_10 = 3.321928094887362

# SplitMix64's constants as signed 64-bit integers, torch's only 64-bit kind.
_GOLDEN_GAMMA, _MIX_1, _MIX_2 = (
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


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


def draw_uniform(
    key: int, sample_ids: Int64[Tensor, " images"], places: Int64[Tensor, " images"], num_draws: int
) -> Float[Tensor, "images draws"]:
    """Draw numbers from 0 up to 1 that depend on nothing but the arguments, the same on every kind of device.

    A counter-based generator: counters are mixed by SplitMix64's finaliser (Steele et al., OOPSLA 2014) in
    64-bit integers that wrap around; the upper 24 bits become the fraction. No state, no wait.
    """
    counters = torch.arange(num_draws, device=sample_ids.device)
    mixed = _mix(_mix(_mix(sample_ids + key) + places)[:, None] + counters)
    return _shift_right(mixed, 40).float() * 2.0**-24


class StainJitter(Algorithm):
    """Jitter the stains of H&E images, before each forward pass of training.

    Runs on the device, on `state.batch.pixel_values` (uint8), for the images whose `is_he` is true; other stains and
    images of unknown stain stay as they are. Evaluation is not touched. What an image gets depends on `seed`, the
    epoch, its sample and its place in the sample alone: not on rank, worker, batch size or split. The batch is
    replaced, never changed in place, so a microbatch that is run again after running out of memory is not jittered
    twice.

    Args:
        strength: Each stain's amount is multiplied by a factor from 1 - strength to 1 + strength: 0.1 is hardly seen,
            0.3 is a clearly different staining.
        shift: A density (decadic absorbance) from -shift to shift is added to each stain everywhere, the slide's white
            included: 0.01 takes up to 13 of white's 255 grey levels.
        probability: The share of H&E images that are jittered.
        seed: Another seed gives another jitter.
    """

    changes_images = True  # so it can't run on stored features

    def __init__(self, strength: float = 0.2, shift: float = 0.01, probability: float = 0.8, seed: int = 17) -> None:
        for name, value in (("strength", strength), ("shift", shift), ("probability", probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"stain_jitter: {name} must lie between 0 and 1, found {value}")
        self.strength, self.shift, self.probability, self.seed = strength, shift, probability, seed

    def __repr__(self) -> str:
        return f"StainJitter({', '.join(f'{name}={value}' for name, value in vars(self).items())})"

    def match(self, event: Event, state: State) -> bool:
        """Run before each microbatch's forward pass; evaluation has events of its own."""
        return event == Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the microbatch by one with jittered images."""
        batch: Batch = state.batch
        images = batch.pixel_values
        assert images is not None  # a set of features is refused before the run
        if not len(images):  # a text-only microbatch
            return
        places = _places_in_samples(batch.num_images, len(images))
        key = _key(self.seed, state.timestamp.epoch.value)
        draws = draw_uniform(key, batch.image_sample_ids, places, 1 + 2 * len(_STAINS))
        chosen = batch.is_he & (draws[:, 0] < self.probability)
        scales, shifts = (draws[:, 1:] * 2 - 1).split(len(_STAINS), dim=1)
        alpha, beta = 1 + self.strength * scales, self.shift * shifts
        jittered = torch.where(chosen[:, None, None, None], jitter_stain(images, alpha, beta), images)
        state.batch = replace(batch, pixel_values=jittered)


def _places_in_samples(num_images_of_samples: Int64[Tensor, " samples"], num_images: int) -> Int64[Tensor, " images"]:
    """Number the images inside each sample: 0, 1, …, 0, 1, … (a sample may occur twice in a row)."""
    first = num_images_of_samples.cumsum(0) - num_images_of_samples
    # With the total given, the device is not asked for it.
    first_of_image = first.repeat_interleave(num_images_of_samples, output_size=num_images)
    return torch.arange(num_images, device=first.device) - first_of_image


def _key(seed: int, epoch: int) -> int:
    """Fold seed and epoch into one number below 2**62, in plain integers."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def _mix(values: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    values = values + _GOLDEN_GAMMA
    values = (values ^ _shift_right(values, 30)) * _MIX_1
    values = (values ^ _shift_right(values, 27)) * _MIX_2
    return values ^ _shift_right(values, 31)


def _shift_right(values: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Shift without copies of the sign bit, which torch's shift of a signed integer brings in."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
