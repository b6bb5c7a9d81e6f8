"""What is stored of a picture: exactly its pixels, and nothing that could name a patient."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from composer_path.images.file import check_image, decode_pixels, sanitize_image
from composer_path.images.pixels import load_image
from composer_path.records.rules import ImageError

NAME = b"DOE^JANE 1957-03-21"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(width: int = 75, height: int = 53) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated_by_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = NAME.decode()  # ImageDescription
    return exif


def segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload


def after_start(jpeg: bytes, inserted: bytes) -> bytes:
    return jpeg[:2] + inserted + jpeg[2:]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Put chunks behind the header, where text usually stands."""
    header_end = len(PNG_SIGNATURE) + 25
    return png[:header_end] + b"".join(chunks) + png[header_end:]


def scan_data(jpeg: bytes) -> bytes:
    """From the first scan on, without end marker or what follows it."""
    return jpeg[jpeg.index(b"\xff\xda") :].split(b"\xff\xd9")[0]


def same_pixels(first: bytes, second: bytes) -> bool:
    size, other = decode_pixels(first), decode_pixels(second)
    return (
        np.array_equal(np.asarray(size), np.asarray(other))
        and size.mode == other.mode
        and torch.equal(load_image(first, 64, "pad"), load_image(second, 64, "pad"))
    )


def plain_jpegs() -> dict[str, bytes]:
    """JPEGs that need no change of pixels, of every kind a scanner or a camera writes."""
    image = picture()
    rgb_marked = encode(image, keep_rgb=True)
    progressive = encode(image, progressive=True, quality=60)
    with_restarts = encode(image, restart_marker_blocks=2)
    assert b"\xff\xd1" in scan_data(with_restarts)
    assert progressive.count(b"\xff\xda") > 3
    jfif_end = 2 + 18
    return {
        "4:2:0": encode(image, subsampling=2),
        "4:4:4": encode(image, subsampling=0),
        "grey": encode(image.convert("L")),
        "progressive": progressive,
        "restart markers": with_restarts,
        "progressive with restart markers": encode(image, progressive=True, restart_marker_rows=1),
        "CMYK": encode(image.convert("CMYK")),
        "RGB marked by Adobe": rgb_marked,
        "optimised": encode(image, optimize=True),
        "density": encode(image, dpi=(300, 300)),
        "no JFIF": encode(image)[:2] + encode(image)[jfif_end:],
        "fill bytes before markers": encode(image).replace(b"\xff\xdb", b"\xff\xff\xff\xff\xdb"),
        "fill bytes before restart markers": with_restarts.replace(b"\xff\xd1", b"\xff\xff\xff\xd1"),
        "fill bytes before the end": encode(image)[:-2] + b"\xff\xff\xff\xd9",
        "junk between segments": encode(image).replace(b"\xff\xdb", NAME + b"\xff\xdb", 1),
        "EXIF says upright": encode(image, exif=rotated_by_exif(1)),
    }


def other_files() -> dict[str, bytes]:
    image = picture()
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    grey16 = Image.fromarray((np.arange(53 * 75, dtype=np.uint32) * 16).astype(np.uint16).reshape(53, 75))
    return {
        "PNG": encode(image, "PNG"),
        "PNG 16 bits": encode(grey16, "PNG"),
        "PNG with alpha": encode(alpha, "PNG"),
        "PNG palette": encode(image.quantize(32), "PNG"),
        "PNG palette with alpha": encode(image.quantize(4), "PNG", transparency=b"\0\x40\x80\xff"),
        "PNG two colours": encode(image.convert("1"), "PNG"),
        "PNG grey with alpha": encode(alpha.convert("LA"), "PNG"),
        "PNG animated": encode(image, "PNG", save_all=True, append_images=[picture().rotate(90)]),
        "PNG rotated": encode(image, "PNG", exif=rotated_by_exif(8)),
        "PNG 16 bits rotated": encode(grey16, "PNG", exif=rotated_by_exif(3)),
        "TIFF": encode(image, "TIFF", compression="tiff_lzw"),
        "TIFF 16 bits": encode(grey16, "TIFF"),
        "TIFF CMYK": encode(image.convert("CMYK"), "TIFF"),
        "TIFF two pages": encode(image, "TIFF", save_all=True, append_images=[picture().rotate(90)]),
        "BMP": encode(image, "BMP"),
        "WebP": encode(image, "WEBP", quality=80),
        "WebP with alpha": encode(alpha, "WEBP", lossless=True),
        "GIF of two frames": encode(image, "GIF", save_all=True, append_images=[picture().rotate(90)]),
        "JPEG 2000": encode(image, "JPEG2000"),
    }


def test_golden_images_keep_every_pixel(golden: Path) -> None:
    files = [path for path in sorted((golden / "images").iterdir()) if path.suffix != ".safetensors"]
    assert len(files) == 10
    for path in files:
        data = path.read_bytes()
        assert same_pixels(sanitize_image(data), data), path.name


@pytest.mark.parametrize("kind", plain_jpegs())
def test_upright_jpegs_stay_jpegs_with_their_coded_data_bit_for_bit(kind: str) -> None:
    data = plain_jpegs()[kind]
    stored = sanitize_image(data)
    assert stored.startswith(b"\xff\xd8")
    assert stored.endswith(b"\xff\xd9")
    assert scan_data(stored) == scan_data(data).rstrip(b"\xff")  # fill bytes may go
    assert same_pixels(stored, data)
    assert NAME not in stored
    assert sanitize_image(stored) == stored


@pytest.mark.parametrize("kind", other_files())
def test_other_files_become_pngs_with_the_same_pixels(kind: str) -> None:
    data = other_files()[kind]
    stored = sanitize_image(data)
    assert stored.startswith(PNG_SIGNATURE)
    assert same_pixels(stored, data)
    assert NAME not in stored
    assert sanitize_image(stored) == stored


def test_16_bit_grey_is_stored_with_16_bits() -> None:
    for kind in ("PNG 16 bits", "PNG 16 bits rotated", "TIFF 16 bits"):
        assert decode_pixels(sanitize_image(other_files()[kind])).mode == "I;16"


@pytest.mark.parametrize("kind", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_rotated_jpeg_becomes_an_upright_png_without_loss(orientation: int, kind: dict) -> None:
    data = encode(picture(), exif=rotated_by_exif(orientation), **kind)
    stored = sanitize_image(data)
    assert stored.startswith(PNG_SIGNATURE)
    assert NAME not in stored
    assert same_pixels(stored, data)
    assert decode_pixels(stored).size == ((53, 75) if orientation >= 5 else (75, 53))
    grey = encode(picture().convert("CMYK"), exif=rotated_by_exif(orientation), **kind)
    assert same_pixels(sanitize_image(grey), grey)


def jpegs_that_name_a_patient() -> dict[str, bytes]:
    jpeg = encode(picture())
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><pn>" + NAME + b"</pn></x:xmpmeta>"
    thumbnail = b"JFXX\0\x13\x06\x01" + NAME[:18]
    jfif_with_thumbnail = b"JFIF\0\x01\x02\0\0\x01\0\x01\x06\x01" + NAME[:18]
    return {
        "EXIF": encode(picture(), exif=rotated_by_exif(1)),
        "XMP": after_start(jpeg, segment(0xE1, xmp)),
        "ICC profile": encode(picture(), icc_profile=NAME * 20),
        "comment": encode(picture(), comment=NAME),
        "IPTC in APP13": after_start(jpeg, segment(0xED, b"Photoshop 3.0\0008BIM" + NAME)),
        "multi-picture": after_start(jpeg, segment(0xE2, b"MPF\0" + NAME)),
        "JFXX thumbnail": after_start(jpeg, segment(0xE0, thumbnail)),
        "JFIF thumbnail": jpeg[:2] + segment(0xE0, jfif_with_thumbnail) + jpeg[20:],
        "Adobe segment too long": after_start(jpeg, segment(0xEE, b"Adobe\0\x64\0\0\0\0\x01" + NAME)),
        "unknown segment": after_start(jpeg, segment(0xE7, NAME)),
        "after the end": jpeg + NAME,
        "second picture after the end": jpeg + encode(picture(), comment=NAME),
        "between scans": between_scans(),
    }


def between_scans() -> bytes:
    jpeg = encode(picture(), progressive=True)
    last_scan = jpeg.rindex(b"\xff\xda")
    return jpeg[:last_scan] + segment(0xFE, NAME) + segment(0xE1, b"Exif\0\0" + NAME) + jpeg[last_scan:]


@pytest.mark.parametrize("place", jpegs_that_name_a_patient())
def test_a_patients_name_in_a_jpeg_is_not_stored(place: str) -> None:
    data = jpegs_that_name_a_patient()[place]
    assert NAME[:18] in data
    stored = sanitize_image(data)
    assert NAME[:8] not in stored
    assert stored.startswith(b"\xff\xd8")
    assert same_pixels(stored, data)


def pngs_that_name_a_patient() -> dict[str, bytes]:
    png = encode(picture(), "PNG")
    international = PngImagePlugin.PngInfo()
    international.add_itxt("XML:com.adobe.xmp", f"<pn>{NAME.decode()}</pn>")
    compressed = PngImagePlugin.PngInfo()
    compressed.add_text("Patient", NAME.decode(), zip=True)
    return {
        "tEXt": with_chunks(png, chunk(b"tEXt", b"Comment\0" + NAME)),
        "iTXt": encode(picture(), "PNG", pnginfo=international),
        "zTXt": encode(picture(), "PNG", pnginfo=compressed),
        "eXIf": encode(picture(), "PNG", exif=rotated_by_exif(1)),
        "eXIf rotated": encode(picture(), "PNG", exif=rotated_by_exif(6)),
        "private chunk": with_chunks(png, chunk(b"paTn", NAME)),
        "after the end": png + NAME,
        "text after the pixels": png[:-12] + chunk(b"tEXt", b"Comment\0" + NAME) + png[-12:],
    }


@pytest.mark.parametrize("place", pngs_that_name_a_patient())
def test_a_patients_name_in_a_png_is_not_stored(place: str) -> None:
    data = pngs_that_name_a_patient()[place]
    stored = sanitize_image(data)
    assert NAME[:8] not in stored
    assert chunk_kinds(stored) <= {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
    assert same_pixels(stored, data)


def chunk_kinds(png: bytes) -> set[bytes]:
    kinds, position = set(), len(PNG_SIGNATURE)
    while position < len(png):
        length, kind = struct.unpack(">I4s", png[position : position + 8])
        kinds.add(kind)
        position += 12 + length
    return kinds


def test_other_formats_lose_their_metadata_too() -> None:
    tiff = encode(picture(), "TIFF", tiffinfo={270: NAME.decode(), 315: NAME.decode()})
    webp = encode(picture(), "WEBP", exif=rotated_by_exif(1), xmp=b"<pn>" + NAME + b"</pn>")
    gif = encode(picture(), "GIF", comment=NAME)
    for data in (tiff, webp, gif, encode(picture(), "TIFF", icc_profile=NAME * 20)):
        assert NAME in data
        stored = sanitize_image(data)
        assert NAME[:8] not in stored
        assert chunk_kinds(stored) <= {b"IHDR", b"IDAT", b"IEND"}


def test_unusable_files_are_refused_before_storing() -> None:
    jpeg = encode(picture())
    for data in (b"", b"GIF89a", jpeg[:-40], jpeg[:200], encode(picture(), "PNG")[:-30], b"no picture"):
        for use in (sanitize_image, check_image):
            with pytest.raises(ImageError) as error:
                use(data)
            assert error.value.rule == "unreadable-image"
    with pytest.raises(ImageError, match=r"found an image of 75 x 53 pixels.*\[too-many-pixels\]"):
        sanitize_image(jpeg, max_pixels=75 * 53 - 1)


def test_errors_never_quote_metadata() -> None:
    for data in (encode(picture(), exif=rotated_by_exif(1))[:-200], NAME * 3, PNG_SIGNATURE + NAME * 3):
        with pytest.raises(ImageError) as error:
            sanitize_image(data)
        assert "DOE" not in str(error.value)
        assert error.value.__cause__ is None
        assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_every_kind_of_random_damage_is_an_image_error_or_harmless() -> None:
    noise = np.random.default_rng(5)
    for data in (encode(picture(), progressive=True, exif=rotated_by_exif(1)), encode(picture(), "PNG")):
        for _ in range(60):
            damaged = bytearray(data)
            for position in noise.integers(0, len(data), 3):
                damaged[position] = noise.integers(0, 256)
            try:
                stored = sanitize_image(bytes(damaged))
            except ImageError:
                continue
            assert same_pixels(stored, bytes(damaged))
