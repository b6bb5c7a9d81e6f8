"""The one way from an image's bytes to the model's pixels: decode, pad or crop, resize, and later normalise.

Images travel as uint8 (a quarter of the bytes of float) and are normalised on the device. With
`decoder="pil"` every number equals the reference's bit for bit; `decoder="torchvision"` is about twice as
fast on JPEGs and at most one grey level off.

What differs from the reference by rule: it ignores EXIF rotation, clips 16-bit grey to white and turns what
is transparent black; here such pictures come out upright, scaled and on white.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor

from composer_path.images.file import (
    MAX_PIXELS,
    ImageError,
    check_image,
    decode_pixels,
    open_image,
    orientation_of,
    to_rgb,
)
from composer_path.images.square import Fit, ResizedMismatch, Square, is_square, pack_square, unpack_square

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "MAX_PIXELS",
    "PAD_COLOR",
    "ImageError",
    "ResizedMismatch",
    "check_image",
    "load_image",
    "load_stored_image",
    "normalize_image",
    "pad_color_of",
    "resize_image",
]

Decoder = Literal["pil", "torchvision"]

# ImageNet's, which the reference uses; other encoders bring their own.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def pad_color_of(mean: Sequence[float]) -> tuple[int, int, int]:
    """Return the colour that normalises to about zero: 255 times the mean, cut (not rounded) to integers."""
    red, green, blue = (int(255 * channel) for channel in mean)
    return red, green, blue


PAD_COLOR = pad_color_of(IMAGE_MEAN)  # (123, 116, 103)


def load_image(
    data: bytes,
    image_size: int,
    fit: Fit = "pad",
    decoder: Decoder = "pil",
    pad_color: Sequence[int] = PAD_COLOR,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[Tensor, "3 size size"]:
    """Decode an image and bring it to the model's size, as the reference does.

    1. Decode to upright 8-bit RGB (see `decode_pixels`: rotation, 16 bits, transparency, CMYK, palettes).
    2. `pad`: centre it on a square of its longer side in `pad_color`.
    3. Resize the shorter side to `image_size`, bicubic with antialiasing; the longer is cut to an integer.
    4. Cut out the centre (nothing is left to cut after `pad`).

    Args:
        data: The file's bytes.
        image_size: Height and width of the result, in pixels.
        fit: `pad` keeps the whole picture, `crop` fills the frame.
        decoder: `pil` is exact, `torchvision` fast for JPEGs that are made smaller; whatever else it meets
            (other formats, rotated, CMYK or smaller pictures) goes through Pillow and is exact.
        pad_color: Red, green and blue of the padding, 0 to 255; `pad_color_of(mean)` of the encoder.
        max_pixels: The most pixels that may be decoded; checked on the header, before any memory is taken.

    Raises:
        ImageError: The picture is unreadable, too large or of an unsupported kind.
        ValueError: An unknown `fit` or `decoder`.
    """
    if fit not in ("pad", "crop"):
        raise ValueError(f"fit must be 'pad' or 'crop', found {fit!r}")
    if decoder not in ("pil", "torchvision"):
        raise ValueError(f"decoder must be 'pil' or 'torchvision', found {decoder!r}")
    red, green, blue = (int(channel) for channel in pad_color)
    if decoder == "torchvision" and _suits_torchvision(open_image(data, max_pixels), image_size, fit):
        return _fit_with_torchvision(_decode_jpeg(data), image_size, fit, (red, green, blue))
    return _fit_with_pil(to_rgb(decode_pixels(data, max_pixels)), image_size, fit, (red, green, blue))


def resize_image(
    data: bytes,
    image_size: int,
    fit: Fit = "pad",
    pad_color: Sequence[int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> bytes:
    """Make the finished square that `--resize` stores in place of the file: `load_image`'s exact pixels.

    Raises:
        ImageError: As `load_image`.
    """
    color = PAD_COLOR if pad_color is None else pad_color  # a crop has none
    pixels = load_image(data, image_size, fit, "pil", color, max_pixels)
    return pack_square(pixels, Square.of(image_size, fit, color))


def load_stored_image(
    data: bytes,
    image_size: int,
    fit: Fit = "pad",
    decoder: Decoder = "pil",
    pad_color: Sequence[int] = PAD_COLOR,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[Tensor, "3 size size"]:
    """Load an image of a shard, be it a file or a finished square; the same pixels for `decoder="pil"`.

    A square holds the `pil` decoder's pixels whatever `decoder` says.

    Raises:
        ImageError: As `load_image`, and for a square that is damaged.
        ResizedMismatch: The shards were resized for another size, fit or padding colour. Not an ImageError, because
            no other sample is better.
    """
    if is_square(data):
        return unpack_square(data, Square.of(image_size, fit, pad_color))
    return load_image(data, image_size, fit, decoder, pad_color, max_pixels)


def normalize_image(
    images: UInt8[Tensor, "*batch 3 height width"],
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
) -> Float[Tensor, "*batch 3 height width"]:
    """Turn 8-bit pixels into what a vision encoder takes: (pixel / 255 - mean) / std in float32.

    Bit-exact to the reference. It runs where `images` lie, without waiting for the device.
    """
    # Constants are sent as tensors: CUDA divides by a plain number as a product with its rounded inverse.
    constants = torch.tensor([[255.0] * 3, list(mean), list(std)], dtype=torch.float32)
    white, center, scale = constants.to(images.device, non_blocking=True)[:, :, None, None]
    return images.to(torch.float32).div_(white).sub_(center).div_(scale)


def _resized_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Width and height once the shorter side is `image_size`; the longer is cut to an integer."""
    if width <= height:
        return image_size, int(image_size * height / width)
    return int(image_size * width / height), image_size


def _fit_with_pil(
    image: Image.Image, image_size: int, fit: Fit, pad_color: tuple[int, int, int]
) -> UInt8[Tensor, "3 size size"]:
    if fit == "pad" and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), pad_color)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    width, height = _resized_size(*image.size, image_size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return _center(pixels, image_size)


def _suits_torchvision(header: ImageFile, image_size: int, fit: Fit) -> bool:
    """Whether this is an upright grey or colour JPEG that is not enlarged (which would be 2 levels off)."""
    side = max(header.size) if fit == "pad" else min(header.size)
    plain = header.format == "JPEG" and header.mode in ("L", "RGB") and orientation_of(header) == 1
    return plain and side >= image_size


def _decode_jpeg(data: bytes) -> UInt8[Tensor, "3 height width"]:
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        if not hasattr(torch.ops.image, "decode_jpeg"):  # torchvision was built for another torch
            raise RuntimeError("decoder: torchvision's JPEG decoder doesn't load here; use 'pil'") from error
        found = f"a JPEG file of {len(data)} bytes that is truncated or damaged"
        raise ImageError("unreadable-image", found, "replace the file") from None


def _fit_with_torchvision(
    pixels: UInt8[Tensor, "3 height width"], image_size: int, fit: Fit, pad_color: tuple[int, int, int]
) -> UInt8[Tensor, "3 size size"]:
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    _, height, width = pixels.shape
    if fit == "pad" and width != height:
        side = max(width, height)
        square = torch.tensor(pad_color, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        square[:, top : top + height, left : left + width] = pixels
        pixels, width, height = square, side, side
    width, height = _resized_size(width, height, image_size)
    pixels = resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    return _center(pixels, image_size)


def _center(pixels: UInt8[Tensor, "3 height width"], image_size: int) -> UInt8[Tensor, "3 size size"]:
    _, height, width = pixels.shape
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return pixels[:, top : top + image_size, left : left + image_size].contiguous()
