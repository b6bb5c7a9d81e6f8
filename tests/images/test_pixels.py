"""Loading pictures: parity with the reference's tensors, the fast decoder, and pictures of awkward kinds."""

from __future__ import annotations

import io
import pickle
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import resize

from composer_path.images.file import check_image
from composer_path.images.fitting import resized_size
from composer_path.images.pixels import (
    IMAGE_MEAN,
    IMAGE_STD,
    PAD_COLOR,
    load_image,
    normalize_image,
    pad_color_of,
)
from composer_path.records.rules import ImageError

GOLDEN_SIZE = 112
OUR_NAME = {"pad": "pad", "square": "crop"}  # the reference's word for a mode: ours


def golden_cases(golden: Path) -> list[tuple[str, str, bytes, Tensor]]:
    """(file name, fit, bytes, the reference's normalised tensor) of every golden picture."""
    expected = load_file(golden / "images" / "expected.safetensors")
    cases = []
    for key, tensor in sorted(expected.items()):
        name, mode = key.split("|")
        cases.append((name, OUR_NAME[mode], (golden / "images" / name).read_bytes(), tensor))
    assert len(cases) == 20
    return cases


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that JPEG and resizing have something to get wrong."""
    noise = np.random.default_rng(seed)
    coarse = noise.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray(
        (smooth.astype(np.int16) + noise.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)
    )


def test_pil_decoder_equals_the_reference_bit_for_bit(golden: Path) -> None:
    for name, fit, data, expected in golden_cases(golden):
        pixels = load_image(data, GOLDEN_SIZE, fit)
        assert pixels.dtype == torch.uint8
        # Measured: equal in all 20 cases, so no tolerance. The transparent golden picture is opaque and none has
        # EXIF, hence our rules for these (white, upright) show nowhere here.
        assert torch.equal(normalize_image(pixels), expected), (name, fit)


def test_torchvision_decoder_is_within_one_grey_level_of_the_reference(golden: Path) -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    for name, fit, data, expected in golden_cases(golden):
        levels = ((expected * std + mean) * 255).round().int()
        difference = (load_image(data, GOLDEN_SIZE, fit, "torchvision").int() - levels).abs()
        # Measured: 1 in 0.3 % of the pixels of the two JPEGs that are made smaller, 0 elsewhere.
        assert difference.max() <= 1, (name, fit)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", [(301, 200), (200, 301), (256, 256), (97, 640)])
@pytest.mark.parametrize("kind", ["colour", "grey", "progressive", "4:4:4"])
def test_decoders_agree_on_jpegs_of_any_kind(fit: str, size: tuple[int, int], kind: str) -> None:
    image = picture(*size)
    if kind == "grey":
        image = image.convert("L")
    options = {"progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}}.get(kind, {})
    data = encode(image, "JPEG", quality=85, **options)
    exact, fast = (load_image(data, 96, fit, decoder).int() for decoder in ("pil", "torchvision"))
    assert exact.shape == (3, 96, 96)
    # Measured: 1; with torch 2.11, 3 where a strip of 97 px is cropped, which hardly changes its size.
    assert (exact - fast).abs().max() <= (1 if torch.__version__.startswith("2.7.") else 3)


def test_torchvision_decoder_is_really_used_for_plain_jpegs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("Pillow decoded the pixels")

    monkeypatch.setattr("composer_path.images.fitting.decode_pixels", refuse)
    load_image(encode(picture(200, 150), "JPEG"), 96, "pad", "torchvision")
    with pytest.raises(AssertionError):
        load_image(encode(picture(200, 150), "PNG"), 96, "pad", "torchvision")


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, decoder: str) -> None:
    image = picture(240, 160)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = load_image(encode(upright, "PNG"), 96)
    difference = (load_image(data, 96, decoder=decoder).int() - expected.int()).abs()
    # torchvision takes only the upright one; the other seven go through Pillow.
    assert difference.max() <= (1 if decoder == "torchvision" and orientation == 1 else 0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_of_other_formats_is_applied_once(kind: str) -> None:
    image = picture(120, 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if kind == "WEBP" else {}
    expected = load_image(encode(image.transpose(Image.Transpose.ROTATE_270)), 96)
    assert torch.equal(load_image(encode(image, kind, exif=exif, **options), 96), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_senseless_exif_does_not_fail_an_image() -> None:
    image = picture(120, 80)
    plain = load_image(encode(image, "JPEG"), 96)
    for exif in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01",
    ):
        assert torch.equal(load_image(encode(image, "JPEG", exif=exif), 96), plain)


def sixteen_bit_files() -> dict[str, tuple[np.ndarray, bytes]]:
    levels = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    wide = Image.fromarray(levels.astype(np.int32))
    big_endian = Image.frombytes("I;16B", (64, 64), levels.astype(">u2").tobytes())
    return {
        "PNG": (levels, encode(Image.fromarray(levels))),
        "TIFF little-endian": (levels, encode(Image.fromarray(levels), "TIFF")),
        "TIFF big-endian": (levels, encode(big_endian, "TIFF")),
        "TIFF 32 bits": (levels, encode(wide, "TIFF")),
    }


@pytest.mark.parametrize("kind", sixteen_bit_files())
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    levels, data = sixteen_bit_files()[kind]
    pixels = load_image(data, 64)
    assert torch.equal(pixels, torch.from_numpy(np.round(levels / 257).astype(np.uint8)).expand(3, -1, -1))
    assert (pixels == 255).float().mean() < 0.01


def test_16_bit_colour_keeps_its_brightness() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    row = b"\0" + bytes.fromhex("0000 8080 ffff 1234 4567 fedc")  # two pixels; Pillow writes no such files
    header = bytes.fromhex("00000002 00000001 10 02 00 00 00")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    pixels = load_image(data, 1, "crop")
    assert load_image(data, 2, "pad", pad_color=(0, 0, 0))[:, 0].T.tolist() == [[0, 0x80, 0xFF], [0x12, 0x45, 0xFE]]
    assert pixels.shape == (3, 1, 1)


def test_grey_levels_beyond_16_bits_are_refused() -> None:
    for level in (-1, 65536):
        data = encode(Image.fromarray(np.full((8, 8), level, dtype=np.int32)), "TIFF")
        with pytest.raises(ImageError, match=f"found grey levels from {level}"):
            load_image(data, 8)
    with pytest.raises(ImageError, match="floating-point"):
        load_image(encode(Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "TIFF"), 8)


def transparent_files() -> dict[str, bytes]:
    """Pictures whose left half is see-through over black, the right half opaque red or grey."""
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[:, 32:] = (200, 30, 40, 255)
    grey = np.zeros((64, 64), dtype=np.uint8)
    grey[:, 32:] = 90
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(rgba[..., 3])])
    palette = Image.fromarray(grey // 90)
    palette = Image.frombytes("P", (64, 64), palette.tobytes())
    palette.putpalette([0, 0, 0, 200, 30, 40])
    return {
        "RGBA": encode(Image.fromarray(rgba)),
        "LA": encode(grey_alpha),
        "palette": encode(palette, transparency=0),
        "palette with alpha": encode(palette, transparency=b"\0\xff"),
        "GIF": encode(palette, "GIF", transparency=0),
        "RGB with a key": encode(Image.fromarray(rgba[..., :3].copy()), transparency=(0, 0, 0)),
        "grey with a key": encode(Image.fromarray(grey), transparency=0),
        "16 bits with a key": encode(Image.fromarray(grey.astype(np.uint16) * 257), transparency=0),
        "WebP": encode(Image.fromarray(rgba), "WEBP", lossless=True),
    }


@pytest.mark.parametrize("kind", transparent_files())
def test_what_is_transparent_becomes_white(kind: str) -> None:
    pixels = load_image(transparent_files()[kind], 64)
    assert (pixels[:, :, :32] == 255).all()
    assert pixels[:, 0, 63].tolist() in ([200, 30, 40], [90, 90, 90])


def test_cmyk_and_palette_and_two_colours_become_rgb() -> None:
    image = picture(64, 64)
    cmyk = encode(image.convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert (load_image(cmyk, 64).int() - load_image(encode(image), 64).int()).abs().float().mean() < 6
    assert torch.equal(load_image(cmyk, 64, decoder="torchvision"), load_image(cmyk, 64))
    palette = image.quantize(256)
    assert torch.equal(load_image(encode(palette), 64), load_image(encode(palette.convert("RGB")), 64))
    assert set(load_image(encode(image.convert("1")), 64).unique().tolist()) == {0, 255}


def test_too_many_pixels_are_refused_by_the_header_alone() -> None:
    # Thirty thousand pixels a side in a few bytes: only a header, so whoever decodes it fails in another way.
    header = bytearray(encode(Image.new("L", (8, 8))))
    header[16:24] = (30_000).to_bytes(4) * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4)
    for decoder in ("pil", "torchvision"):
        with pytest.raises(ImageError) as error:
            load_image(bytes(header), 8, decoder=decoder)
        assert error.value.rule == "too-many-pixels"
        assert "30000 x 30000" in error.value.found
    with pytest.raises(ImageError, match="raise max_pixels"):
        check_image(encode(picture(100, 100), "JPEG"), max_pixels=9_999)
    check_image(encode(picture(100, 100), "JPEG"), max_pixels=10_000)


@pytest.mark.skipif(Image.__version__ >= "13", reason="Pillow 13 applies its own limit to WebP before ours is asked")
def test_our_limit_and_not_pillows_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
            assert load_image(encode(picture(64, 64), kind), 32).shape == (3, 32, 32)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_strip_whose_square_would_fill_memory_is_refused() -> None:
    for size in ((20_000, 50), (50, 20_000), (600, 2)):
        with pytest.raises(ImageError) as error:
            check_image(encode(Image.new("L", size)))
        assert error.value.rule == "too-narrow"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
def test_damaged_files_raise_image_errors_without_quoting_the_file(kind: str, decoder: str) -> None:
    data = encode(picture(200, 150), kind)
    for damaged in (
        data[: len(data) // 2],
        data[:20],
        data[: len(data) - len(data) // 10],
        b"JOHN DOE" * 5,
        b"",
    ):
        with pytest.raises(ImageError) as error:
            load_image(damaged, 96, decoder=decoder)
        assert error.value.rule == "unreadable-image"
        assert "JOHN" not in str(error.value)
        assert error.value.__cause__ is None
        with pytest.raises(ImageError):
            check_image(damaged)


def test_a_torchvision_that_does_not_load_is_not_taken_for_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*args: object, **keywords: object) -> None:
        raise RuntimeError("Couldn't load the image extension.")

    monkeypatch.setattr("composer_path.images.pixels.jpeg_pixels", lambda *_: None)  # simplejpeg asks no torchvision
    monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
    monkeypatch.setattr(torch.ops, "image", SimpleNamespace())
    data = encode(picture(200, 150), "JPEG")
    with pytest.raises(RuntimeError, match=r"torchvision's JPEG decoder doesn't load here; use 'pil'"):
        load_image(data, 96, decoder="torchvision")
    load_image(data, 96, decoder="pil")


def test_image_error_survives_the_way_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(ImageError("unreadable-image", "a PNG file", "replace the file")))
    assert (error.rule, error.found, error.fix) == ("unreadable-image", "a PNG file", "replace the file")
    assert str(error) == "an image must decode, found a PNG file; replace the file [unreadable-image]"


@pytest.mark.usefixtures("without_type_checks")
def test_unknown_modes_are_refused() -> None:
    data = encode(picture(8, 8))
    with pytest.raises(ValueError, match="fit must be 'pad' or 'crop', found 'stretch'"):
        load_image(data, 8, "stretch")
    with pytest.raises(ValueError, match="decoder must be"):
        load_image(data, 8, "pad", "cv2")


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_padding_is_centred_and_in_the_colour_asked_for(decoder: str) -> None:
    data = encode(Image.new("RGB", (96, 48), (10, 20, 30)), "JPEG", quality=100, subsampling=0)
    pixels = load_image(data, 96, "pad", decoder, pad_color=(255, 254, 253))
    for row in (0, 23, 72, 95):
        assert pixels[:, row, 50].tolist() == [255, 254, 253]
    for row in (24, 71):
        assert (pixels[:, row, 50].int() - torch.tensor([10, 20, 30])).abs().max() <= 1


def test_pad_color_is_the_mean_cut_to_integers() -> None:
    assert PAD_COLOR == pad_color_of(IMAGE_MEAN) == (123, 116, 103)
    assert pad_color_of([0.5, 0.5, 0.5]) == (127, 127, 127)
    assert pad_color_of((0.48145466, 0.4578275, 0.40821073)) == (122, 116, 104)


def test_normalization_takes_any_leading_axes_and_any_statistics() -> None:
    images = torch.randint(0, 256, (2, 4, 3, 5, 7), dtype=torch.uint8)
    before = images.clone()
    normalised = normalize_image(images, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    assert torch.equal(images, before)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)))
    assert torch.equal(normalised, (images.float() / 255 - mean) / std)
    assert normalize_image(images[0, :0]).shape == (0, 3, 5, 7)


def test_threads_do_not_disturb_each_other(golden: Path) -> None:
    cases = golden_cases(golden) * 3
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: load_image(case[2], GOLDEN_SIZE, case[1]), cases))
    for (name, fit, _, expected), pixels in zip(cases, results, strict=True):
        assert torch.equal(normalize_image(pixels), expected), (name, fit)


@pytest.mark.gpu
def test_normalization_on_the_device_is_bit_exact_and_does_not_wait() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 4, 1)
    on_device = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        normalised = normalize_image(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(normalised.cpu(), normalize_image(images))


@pytest.mark.parametrize("size", [(100, 151), (151, 100), (64, 65), (333, 100)])
def test_the_longer_side_is_cut_to_an_integer_as_torchvision_does(size: tuple[int, int]) -> None:
    assert resized_size(*size, 64) == resize(Image.new("RGB", size), [64]).size
