"""Pictures to pixels as in training, behind transformers' interface of image processors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from composer_path.images.file import pixels_of
from composer_path.images.fitting import fit_square
from composer_path.images.pixels import IMAGE_MEAN, IMAGE_STD, PAD_COLOR, ImagePreparation, normalize_image
from composer_path.images.untrusted import load_untrusted, load_untrusted_file


class ComposerPathImageProcessor(BaseImageProcessor):
    """Any picture to a square that is normalised for the vision encoder.

    A file, as a path or as bytes, and a picture that Pillow has opened and not converted come out bit for bit as in
    training: upright, 16 bits scaled, what is transparent on white. Arrays are 8-bit RGB. Files are examined as
    `composer-path ask` does: what a conversion refuses is refused.

    Args:
        image_size: Side in pixels.
        fit: See `composer_path.ImagePreparation`, also for the next three.
        decoder: `pil` or `torchvision`, of files.
        pad_color: Red, green, blue.
        max_pixels: The most that are decoded.
        scale_levels: See `composer_path.ImagePreparation`.
        image_mean: Of the encoder.
        image_std: Likewise.
        **kwargs: Of transformers' own.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]  # type: ignore[misc]

    def __init__(
        self,
        image_size: int = 224,
        fit: str = ImagePreparation.fit,
        decoder: str = ImagePreparation.decoder,
        pad_color: Sequence[int] = PAD_COLOR,
        max_pixels: int = ImagePreparation.max_pixels,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        scale_levels: bool = ImagePreparation.scale_levels,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size, self.fit, self.decoder, self.max_pixels = image_size, fit, decoder, max_pixels
        self.scale_levels = scale_levels
        self.pad_color, self.image_mean, self.image_std = list(pad_color), list(image_mean), list(image_std)
        self.preparation  # noqa: B018  # refuses what it doesn't know

    @property
    def preparation(self) -> ImagePreparation:
        """How pictures are prepared."""
        red, green, blue = self.pad_color
        settings: dict[str, Any] = {key: getattr(self, key) for key in ("fit", "decoder", "max_pixels", "scale_levels")}
        return ImagePreparation(self.image_size, pad_color=(red, green, blue), **settings)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """See `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """Pictures, alone or in lists within lists, to `pixel_values`, float32 of (images, 3, size, size).

        Args:
            images: Pillow's, paths, bytes, or arrays and tensors of (height, width, 3) or (3, height, width), uint8.
            return_tensors: "pt", "np", or None for a list of arrays.
            **kwargs: Refused: how a picture is prepared is the model's affair; `do_resize` and the like as they are.

        Raises:
            ValueError: A picture that can't be read or isn't of these kinds, or another way of preparing it.
        """
        fixed = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
        for key, value in kwargs.items():
            if value is not None and key not in ("device", "input_data_format") and fixed.get(key) is not value:
                raise ValueError(f"image processor: '{key}' can't be set here, pictures are prepared as in training")
        pixels = [self._pixels(image) for image in flat(images)]
        shape = (0, 3, self.image_size, self.image_size)
        squares = torch.stack(pixels) if pixels else torch.empty(shape, dtype=torch.uint8)
        normal = normalize_image(squares, mean=self.image_mean, std=self.image_std)
        values: Any = normal if str(return_tensors) in ("pt", "TensorType.PYTORCH") else list(normal.numpy())
        return BatchFeature({"pixel_values": values}, tensor_type=None if values is normal else return_tensors)

    def _pixels(self, image: Any) -> torch.Tensor:
        preparation = self.preparation
        if isinstance(image, (str, Path)):
            return load_untrusted_file(image, preparation)
        if isinstance(image, (bytes, bytearray, memoryview)):
            return load_untrusted(bytes(image), preparation)
        if isinstance(image, torch.Tensor):
            image = image.cpu().numpy()
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]):
                found = f"{image.dtype} of {'x'.join(map(str, image.shape))}"
                raise ValueError(f"image: an array must be uint8 of height x width x 3, found {found}")
            image = Image.fromarray(np.ascontiguousarray(image if image.shape[2] == 3 else image.transpose(1, 2, 0)))
        if not isinstance(image, Image.Image):
            raise ValueError(f"image: must be a picture, a path, bytes or an array, found {type(image).__name__}")
        red, green, blue = self.pad_color
        picture = pixels_of(image, self.max_pixels, self.scale_levels)
        return torch.from_numpy(fit_square(picture, self.image_size, preparation.fit, (red, green, blue)))


def flat(images: Any) -> Iterator[Any]:
    """Pictures out of lists within lists, in order; None is no picture."""
    if isinstance(images, (list, tuple)):
        for one in images:
            yield from flat(one)
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        yield from images
    elif images is not None:
        yield images
