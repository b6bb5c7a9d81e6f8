"""The one way from an image's bytes to the model's pixels: decode, pad or crop, resize, and later normalise.

Images travel as uint8 (a quarter of the bytes of float) and are normalised on the device. With `decoder="pil"` every
number equals the reference's bit for bit; `decoder="torchvision"` is about twice as fast on JPEGs and at most one grey
level off.

What differs from the reference by rule: it ignores EXIF rotation, clips 16-bit grey to white and turns what is
transparent black; here such pictures come out upright, scaled and on white.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from composer_path.images.file import MAX_PIXELS
from composer_path.images.fitting import fit_square, plain_jpeg_size, resized_size, rgb_image
from composer_path.images.jpeg_pixels import jpeg_pixels
from composer_path.images.stored_square import Fit, Square, is_square, pack_square, unpack_square
from composer_path.records.rules import ImageError

Decoder = Literal["pil", "torchvision"]
Pixels = UInt8[Tensor, "3 size size"]

# ImageNet's, which the reference uses; other encoders bring their own.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def pad_color_of(mean: Sequence[float]) -> tuple[int, int, int]:
    """The colour that normalises to about zero: 255 times the mean, cut (not rounded) to integers."""
    red, green, blue = (int(255 * channel) for channel in mean)
    return red, green, blue


PAD_COLOR = pad_color_of(IMAGE_MEAN)  # (123, 116, 103)


@dataclass(frozen=True)
class ImagePreparation:
    """How images are prepared for a model: the only way in which these settings travel.

    Args:
        image_size: Height and width of the result, in pixels.
        fit: `pad` keeps the whole picture, `crop` fills the frame.
        decoder: `pil` is exact, `torchvision` fast for JPEGs that are made smaller; whatever else it meets (other
            formats, rotated, CMYK or smaller pictures) goes through Pillow and is exact.
        pad_color: Red, green and blue of the padding, 0 to 255; `pad_color_of(mean)` of the encoder.
        max_pixels: The most pixels that may be decoded; checked on the header, before any memory is taken.
        scale_levels: Files of 16-bit grey below 4,096 are taken for 12 bits, and scaled; a shard's were by `convert`.

    Raises:
        ValueError: An unknown `fit` or `decoder`.
    """

    image_size: int
    fit: Fit = "pad"
    decoder: Decoder = "pil"
    pad_color: tuple[int, int, int] = PAD_COLOR
    max_pixels: int = MAX_PIXELS
    scale_levels: bool = False

    def __post_init__(self) -> None:
        for name, words in (("fit", Fit), ("decoder", Decoder)):
            if getattr(self, name) not in get_args(words):
                known = " or ".join(map(repr, get_args(words)))
                raise ValueError(f"{name} must be {known}, found {getattr(self, name)!r}")
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise ValueError(f"max_pixels must be a whole number of at least 1, found {self.max_pixels!r}")

    @classmethod
    def of_square(cls, square: Square, max_pixels: int) -> ImagePreparation:
        """The way in which a finished square is made."""
        return cls(square.image_size, square.fit, pad_color=square.pad_color or PAD_COLOR, max_pixels=max_pixels)

    @property
    def square(self) -> Square:
        """What a finished square must be to stand for an image."""
        return Square.of(self.image_size, self.fit, self.pad_color)

    def load(self, data: bytes) -> Pixels:
        """Decode an image file and bring it to the model's size, as the reference does.

        1. Decode to upright 8-bit RGB (see `decode_pixels`: rotation, 16 bits, transparency, CMYK, palettes).
        2. `pad`: centre it on a square of its longer side in `pad_color`.
        3. Resize the shorter side to `image_size`, bicubic with antialiasing; the longer is cut to an integer.
        4. Cut out the centre (nothing is left to cut after `pad`).

        Raises:
            ImageError: The picture is unreadable, too large or of an unsupported kind.
        """
        if self.decoder == "torchvision" and self._is_made_smaller(data):
            return self._fit_with_torchvision(_decode_jpeg(data))
        image = rgb_image(data, self.max_pixels, self.scale_levels)
        return torch.from_numpy(fit_square(image, self.image_size, self.fit, self.pad_color))

    def load_stored(self, data: bytes | memoryview) -> Pixels:
        """Load an image of a shard, be it a file or a finished square; a square holds the `pil` decoder's pixels.

        Raises:
            ImageError: As `load`, and for a square that is damaged.
            ResizedMismatch: The shards were resized for another size, fit or padding colour: no other sample is better.
        """
        if is_square(data):
            return torch.from_numpy(unpack_square(data, self.square))
        return replace(self, scale_levels=False).load(bytes(data))

    def resize(self, data: bytes) -> bytes:
        """Make the finished square that `--resize` stores in place of the file."""
        return pack_square(self.load(data).numpy(), self.square)

    def _is_made_smaller(self, data: bytes) -> bool:
        """Whether a file is an ordinary JPEG that isn't enlarged; with torchvision that would be 2 levels off."""
        size = plain_jpeg_size(data, self.max_pixels)
        return size is not None and (max(size) if self.fit == "pad" else min(size)) >= self.image_size

    def _fit_with_torchvision(self, pixels: UInt8[Tensor, "3 height width"]) -> Pixels:
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        _, height, width = pixels.shape
        if self.fit == "pad" and width != height:
            side = max(width, height)
            square = torch.tensor(self.pad_color, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
            top, left = (side - height) // 2, (side - width) // 2
            square[:, top : top + height, left : left + width] = pixels
            pixels, width, height = square, side, side
        width, height = resized_size(width, height, self.image_size)
        return _center(resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True), self.image_size)


def load_image(
    data: bytes,
    image_size: int,
    fit: Fit = ImagePreparation.fit,
    decoder: Decoder = ImagePreparation.decoder,
    pad_color: Sequence[int] = ImagePreparation.pad_color,
    max_pixels: int = ImagePreparation.max_pixels,
) -> Pixels:
    """`ImagePreparation.load` with the settings one by one."""
    red, green, blue = map(int, pad_color)
    return ImagePreparation(image_size, fit, decoder, (red, green, blue), max_pixels).load(data)


def normalize_image(
    images: UInt8[Tensor, "*batch 3 height width"], mean: Sequence[float] = IMAGE_MEAN, std: Sequence[float] = IMAGE_STD
) -> Float[Tensor, "*batch 3 height width"]:
    """Turn 8-bit pixels into what a vision encoder takes: (pixel / 255 - mean) / std in float32.

    Bit-exact to the reference. It runs where `images` lie, without waiting for the device.
    """
    # Constants are sent as tensors: CUDA divides by a plain number as a product with its rounded inverse.
    constants = torch.tensor([[255.0] * 3, list(mean), list(std)], dtype=torch.float32)
    white, center, scale = constants.to(images.device, non_blocking=True)[:, :, None, None]
    return images.to(torch.float32).div_(white).sub_(center).div_(scale)


def _decode_jpeg(data: bytes) -> UInt8[Tensor, "3 height width"]:
    if (pixels := jpeg_pixels(data, "RGB")) is not None:
        return torch.from_numpy(pixels).permute(2, 0, 1)
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        if not hasattr(torch.ops.image, "decode_jpeg"):  # torchvision was built for another torch
            raise RuntimeError("decoder: torchvision's JPEG decoder doesn't load here; use 'pil'") from error
        found = f"a JPEG file of {len(data)} bytes that is truncated or damaged"
        raise ImageError("unreadable-image", found, "replace the file") from None


def _center(pixels: UInt8[Tensor, "3 height width"], image_size: int) -> Pixels:
    _, height, width = pixels.shape
    top, left = (height - image_size) // 2, (width - image_size) // 2
    center = pixels[:, top : top + image_size, left : left + image_size]
    return torch.from_numpy(np.array(center.numpy(), order="C"))  # laid out in half of torch's time
