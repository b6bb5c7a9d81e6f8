"""Stain transfer: H&E tiles in the colours of another laboratory, given by the statistics of its images.

Reinhard's colour transfer (IEEE Computer Graphics and Applications 21, 2001): in the space l-alpha-beta, whose three
axes hardly correlate, mean and deviation of an image become those of the reference. Only tissue is measured, so the
share of glass in a tile doesn't matter; all pixels are transferred. Matrices are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from composer_path.algorithms.image_algorithm import ImageAlgorithm
from composer_path.batches.batch import Batch

_LMS = torch.tensor([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]], dtype=torch.float64)
_AXES = (
    torch.tensor([[1, 1, 1], [1, 1, -2], [1, -1, 0]], dtype=torch.float64) * torch.tensor([3, 6, 2])[:, None] ** -0.5
)
_TO = (_LMS.float(), _AXES.float())
_BACK = (torch.linalg.inv(_AXES).float(), torch.linalg.inv(_LMS).float())
_LOG2_OF_10 = 3.321928094887362
_WHITE = 220  # the darkest colour of a pixel of glass is brighter
_LEAST_TISSUE = 0.02  # of a tile's pixels; with less there is nothing to measure
_EPSILON = 1e-6

Images = UInt8[Tensor, "images 3 height width"]
Statistics = Float[Tensor, "images 2 3"]  # mean and deviation, in l-alpha-beta


def transfer_stain(images: Images, reference: Float[Tensor, "2 3"]) -> Images:
    """Give each image the mean and deviation of the reference. Images with hardly any tissue stay as they are.

    1. To l-alpha-beta: log10 of the cones' answers, rotated.
    2. `(value - mean) * reference deviation / deviation + reference mean`, on each axis.
    3. Back, rounded, kept within 0 and 255.
    """
    colors, tissue = _to_axes(images), _tissue(images)
    measured = _statistics(colors, tissue)
    mean, deviation = measured[:, 0, :, None, None], measured[:, 1, :, None, None]
    wanted = reference.to(images.device, non_blocking=True)
    scale = wanted[1][:, None, None] / deviation.clamp(min=_EPSILON)
    moved = (colors - mean) * scale + wanted[0][:, None, None]
    cones = torch.exp2(_mixed(moved, _BACK[0]) * _LOG2_OF_10)
    changed = (_mixed(cones, _BACK[1]) * 255).round_().clamp_(0, 255).to(torch.uint8)
    enough = tissue.float().mean(dim=(2, 3)) > _LEAST_TISSUE
    return torch.where(enough[:, :, None, None], changed, images)


def stain_statistics(images: Iterable[Images]) -> tuple[list[float], list[float]]:
    """Mean and deviation of a set's tissue: the averages of its images', which `stain_transfer` takes from the YAML.

    Raises:
        ValueError: There is no image with tissue.
    """
    found = [
        _statistics(_to_axes(one), _tissue(one))[_tissue(one).float().mean(dim=(1, 2, 3)) > _LEAST_TISSUE]
        for one in images
    ]
    if not found or not sum(map(len, found)):
        raise ValueError("stain_transfer: a reference must have images with tissue; found none")
    mean, deviation = torch.cat(found).double().mean(dim=0)
    return [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in deviation.tolist()]


class StainTransfer(ImageAlgorithm):
    """Give H&E images the colours of a reference set; other stains and images of unknown stain stay as they are.

    An augmentation: training sees both laboratories, evaluation and `ask` show images as they are.

    Args:
        mean: Of the reference in l, alpha and beta, from `stain_statistics`.
        std: Its deviations.
        probability: The share of H&E images that get them.
        seed: Another seed chooses other images.
    """

    num_draws, drawn_as = 1, "stain_transfer"

    def __init__(self, mean: list[float], std: list[float], probability: float = 0.5, seed: int = 17) -> None:
        super().__init__(seed, probability=probability)
        check_statistics(mean, std)
        self.mean, self.std, self.probability = mean, std, probability
        self.reference = torch.tensor([list(mean), list(std)], dtype=torch.float32)

    def change(
        self,
        images: UInt8[Tensor, "images 3 height width"],
        draws: Float[Tensor, "images draws"],
        batch: Batch,
    ) -> UInt8[Tensor, "images 3 height width"]:
        """Transfer those that are chosen."""
        chosen = batch.is_he & (draws[:, 0] < self.probability)
        return torch.where(chosen[:, None, None, None], transfer_stain(images, self.reference), images)


def check_statistics(mean: list[float], std: list[float]) -> None:
    """ValueError where these aren't three numbers each, deviations above 0."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            found = f"found {len(values)} numbers" if len(values) != 3 else f"found {min(values)}"
            rule = "must be three numbers (l, alpha, beta)" + (" above 0" if name == "std" else "")
            raise ValueError(f"stain_transfer.{name}: {rule}; {found}; measure them with stain_statistics")


def _to_axes(images: Images) -> Float[Tensor, "images 3 height width"]:
    cones = _mixed((images.float() / 255), _TO[0]).clamp_(min=1 / 1024)
    return _mixed(cones.log10_(), _TO[1])


def _mixed(values: Float[Tensor, "images 3 height width"], table: Float[Tensor, "3 3"]) -> Tensor:
    """Each pixel's three values times a matrix, in products of single numbers: the same in any batch, without TF32."""
    rows = []
    for row in table.tolist():
        rows.append(values[:, 0] * row[0] + values[:, 1] * row[1] + values[:, 2] * row[2])
    return torch.stack(rows, dim=1)


def _tissue(images: Images) -> Bool[Tensor, "images 1 height width"]:
    return images.amin(dim=1, keepdim=True) < _WHITE


def _statistics(
    colors: Float[Tensor, "images 3 height width"], tissue: Bool[Tensor, "images 1 height width"]
) -> Statistics:
    """Mean and deviation of each image's tissue; image by image, so that neighbours change no rounding."""
    weights = tissue.double()
    count = weights.sum(dim=(2, 3)).clamp(min=1)
    mean = (colors * weights).sum(dim=(2, 3)) / count
    spread = ((colors - mean[:, :, None, None]) ** 2 * weights).sum(dim=(2, 3)) / count
    return torch.stack([mean, spread.sqrt()], dim=1).float()
