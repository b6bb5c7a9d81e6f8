"""Stain transfer: the reference's colours, by the paper's formula, on tissue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from composer_path.algorithms.stain_transfer import StainTransfer, stain_statistics, transfer_stain

IMAGES = Path(__file__).resolve().parents[2] / "test_data" / "imgs"
OURS = ("hgsc_nest_x0160_y0480_160.jpg", "hgsc_nest_x0640_y0000_160.jpg", "hgsc_stroma_x0640_y0480_160.jpg")
THEIRS = ("cmu_x0640_y2800_160.jpg", "cmu_x0800_y2800_160.jpg", "cmu_x0960_y1600_160.jpg")


def tiles(names: tuple[str, ...]) -> torch.Tensor:
    found = [np.asarray(Image.open(IMAGES / name).convert("RGB").resize((64, 64))) for name in names]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def by_the_paper(image: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Reinhard et al. 2001, equations 4 to 11, of an image that is tissue everywhere."""
    to_lms = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
    axes = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
    values = axes @ np.log10(np.maximum(to_lms @ (image.reshape(3, -1) / 255), 1 / 1024))
    values = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True) * std[:, None] + mean[:, None]
    back = np.linalg.inv(to_lms) @ 10 ** (np.linalg.inv(axes) @ values)
    return np.clip(np.rint(back * 255), 0, 255).reshape(image.shape)


def test_it_is_the_papers_formula() -> None:
    image = torch.randint(20, 200, (1, 3, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    mean, std = [-0.6, 0.03, 0.02], [0.2, 0.02, 0.01]
    found = transfer_stain(image, torch.tensor([mean, std]))[0].numpy().astype(int)
    expected = by_the_paper(image[0].numpy(), np.array(mean), np.array(std))
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.02  # rounding at a half


def test_an_images_own_statistics_change_nothing() -> None:
    image = tiles(OURS[:1])
    mean, std = stain_statistics([image])
    assert (transfer_stain(image, torch.tensor([mean, std])).int() - image.int()).abs().max() <= 2


def test_the_references_statistics_are_met_on_real_histology() -> None:
    reference = torch.tensor(stain_statistics([tiles(THEIRS)]))
    found = torch.tensor(stain_statistics([transfer_stain(tiles(OURS), reference)]))
    before = torch.tensor(stain_statistics([tiles(OURS)]))
    assert (found - reference).abs().max() < 0.3 * (before - reference).abs().max()  # colours beyond white are cut


def test_glass_stays_as_it_is() -> None:
    blank = torch.full((1, 3, 8, 8), 250, dtype=torch.uint8)
    assert torch.equal(transfer_stain(blank, torch.tensor([[-0.6, 0.0, 0.0], [0.2, 0.1, 0.1]])), blank)


def test_a_reference_without_tissue_is_refused() -> None:
    with pytest.raises(ValueError, match="must have images with tissue; found none"):
        stain_statistics([torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)])


def test_statistics_must_be_three_numbers_with_deviations_above_0() -> None:
    with pytest.raises(ValueError, match=r"stain_transfer\.std: must be three numbers .* above 0; found 0"):
        StainTransfer([0.0, 0.0, 0.0], [1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"stain_transfer\.mean: must be three numbers .*; found 2 numbers"):
        StainTransfer([0.0, 0.0], [1.0, 1.0, 1.0])
