"""Any image is read rightly or refused by name: damaged, unsupported and too large are three answers."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from odd_files import chunk, encode, gray16_png, jpeg_with_frame, tiff, tissue, with_chunks
from PIL import Image

from composer_path.images.file import check_image, decode_pixels, examine_image, stored_by_structure, to_rgb
from composer_path.records.rules import ImageError

CASES = Path(__file__).with_name("cases")
GRAY = np.asarray(tissue().convert("L"))
RGB = np.asarray(tissue())
GRAY16 = GRAY.astype(np.uint16) * 257


def rgb(data: bytes, **options: bool) -> np.ndarray:
    return np.asarray(to_rgb(decode_pixels(data, **options)))


def case(name: str) -> bytes:
    return (CASES / name).read_bytes()


def refusal(data: bytes) -> tuple[str, str]:
    """Rule and finding, the same from every use."""
    found = set()
    for use in (examine_image, check_image, decode_pixels):
        with pytest.raises(ImageError) as error:
            use(data)
        found.add((error.value.rule, error.value.found))
    assert len(found) == 1
    return found.pop()


def test_a_lossless_jpeg_is_decoded_whole_and_stored_as_png() -> None:
    stored = examine_image(case("lossless.jpg")).data
    assert stored.startswith(b"\x89PNG")
    assert np.array_equal(rgb(stored), rgb(case("gray16.tif")))
    assert stored_by_structure(case("lossless.jpg")) is None
    assert check_image(case("lossless.jpg")) == []


def test_a_png_with_a_large_profile_is_whole() -> None:
    data = case("big_iccp.png")
    stored = examine_image(data).data
    assert b"iCCP" in data and b"iCCP" not in stored
    assert np.array_equal(rgb(stored), rgb(data))


def test_white_is_zero_is_no_negative() -> None:
    assert np.array_equal(rgb(case("miniswhite16.tif")), rgb(case("gray16.tif")))
    for order in "<>":
        inverted = tiff([{"pixels": 65535 - GRAY16, "tags": {262: 0}}], order)
        assert np.array_equal(rgb(inverted), rgb(tiff([{"pixels": GRAY16}], order))), order
        assert np.array_equal(rgb(tiff([{"pixels": 255 - GRAY, "tags": {262: 0}}], order))[..., 0], GRAY), order
    packed = np.packbits(GRAY > 127, axis=1)
    bits = {256: GRAY.shape[1], 258: 1, 278: GRAY.shape[0]}
    black, white = ({"pixels": bytes_, "tags": bits | {262: kind}} for bytes_, kind in ((packed, 1), (~packed, 0)))
    assert np.array_equal(rgb(tiff([black])), rgb(tiff([white])))
    assert np.array_equal(rgb(tiff([black]))[..., 0] > 0, GRAY > 127)


def test_12_bits_in_16_are_counted_and_scaled_on_request() -> None:
    data = case("gray12in16.tif")
    assert examine_image(data).oddities == ["levels_below_4096"]
    scaled = examine_image(data, scale_levels=True).data
    assert abs(int(rgb(scaled).astype(int).mean()) - int(rgb(case("gray16.tif")).astype(int).mean())) <= 1
    png = gray16_png(GRAY16 >> 4)
    assert np.abs(rgb(examine_image(png, scale_levels=True).data)[..., 0].astype(int) - GRAY).max() <= 1
    assert examine_image(gray16_png(GRAY16), scale_levels=True).data == examine_image(gray16_png(GRAY16)).data


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("jpeg2000.tif", "a TIFF file compressed with JPEG 2000"),
        ("jpeg_12bit.jpg", "a JPEG of 12 bits for each sample"),
        ("zstd.tif", "a TIFF file compressed with Zstd"),
    ],
)
def test_files_of_the_field_that_are_not_read_are_unsupported_and_say_what_they_are(name: str, found: str) -> None:
    assert refusal(case(name)) == ("unsupported-image", found)


JPEGS = {
    "JPEG-LS": (jpeg_with_frame({}, 0xF7), "a JPEG-LS file"),
    "hierarchical": (jpeg_with_frame({}, 0xC5), "a hierarchical JPEG"),
    "lossless arithmetic": (jpeg_with_frame({}, 0xCB), "an arithmetic-coded lossless JPEG"),
    "16 bits lossless": (jpeg_with_frame({0: 16}, 0xC3), "a lossless JPEG of 16 bits for each sample"),
    "two components": (jpeg_with_frame({5: 2}), "a JPEG of 2 components"),
    "height in DNL": (jpeg_with_frame({1: 0, 2: 0}), "a JPEG whose height isn't in its header"),
    "fractional": (jpeg_with_frame({7: 0x31, 10: 0x21}), "a JPEG with fractional sampling of its colours"),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_that_are_not_read_are_named_before_a_decoder_sees_them(kind: str) -> None:
    data, found = JPEGS[kind]
    assert refusal(data) == ("unsupported-image", found)


def test_a_jpeg_of_two_frames_or_of_very_many_scans_is_refused() -> None:
    data = encode(tissue(), "JPEG", progressive=True)
    frame, scan = data.index(b"\xff\xc2"), data.rindex(b"\xff\xda")
    twice = data[:scan] + data[frame : frame + 19] + data[scan:]
    with pytest.raises(ImageError, match=r"has two frames.*\[unreadable-image\]"):
        examine_image(twice)
    many = data[:-2] + data[scan:-2] * 120 + data[-2:]
    with pytest.raises(ImageError, match=r"more than 100 scans.*\[unsupported-image\]"):
        examine_image(many)


def test_a_jpeg_without_its_end_is_answered_the_same_by_both_checks() -> None:
    whole = encode(tissue(), "JPEG")
    assert stored_by_structure(whole[:-2]) is None  # so decoding decides
    assert examine_image(whole[:-2]).data == whole


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_whose_end_was_never_copied_is_damaged(progressive: bool) -> None:
    whole = encode(tissue(320, 240), "JPEG", quality=95, progressive=progressive)
    for use in (examine_image, check_image, stored_by_structure):
        with pytest.raises(ImageError, match="ends in zeros"):
            use(whole[:-600] + bytes(600))
    assert examine_image(whole + bytes(600)).data == examine_image(whole).data


def test_what_is_no_pixel_of_a_png_may_be_wrong_and_what_is_may_not() -> None:
    png = encode(tissue(), "PNG")
    profile = b"x\0\0" + zlib.compress(bytes(3_000_000))
    odd = {
        "long profile": with_chunks(png, chunk(b"iCCP", profile)),
        "wrong checksum of a text": with_chunks(png, chunk(b"tEXt", b"a\0b", wrong=True)),
        "text that unpacks to 64 MB": with_chunks(png, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))),
        "orientation that unpacks to 64 MB": with_chunks(
            png, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**26)))
        ),
        "text that doesn't unpack": with_chunks(png, chunk(b"zTXt", b"a\0\0no")),
        "profile that doesn't unpack": with_chunks(png, chunk(b"iCCP", b"x\0\0no")),
        "wrong gamma": with_chunks(png, chunk(b"gAMA", b"")),
        "wrong resolution": with_chunks(png, chunk(b"pHYs", b"12")),
        "no end": png[:-12],
    }
    for kind, data in odd.items():
        assert examine_image(data).data == png, kind
    body = png.index(b"IDAT")
    for place in (body + 10, body + 20):
        damaged = bytearray(png)
        damaged[place] ^= 1
        assert refusal(bytes(damaged))[0] == "unreadable-image"
    assert refusal(with_chunks(png, chunk(b"ABCD", b"")))[0] == "unsupported-image"
    assert "CgBI" in refusal(png[:8] + chunk(b"CgBI", b"\0\0\0\0") + png[8:])[1]


def test_profiles_and_tags_of_other_formats_may_be_large_or_wrong() -> None:
    image = tissue()
    plain = encode(image, "TIFF")
    tagged = encode(image, "TIFF", icc_profile=bytes(2_000_000), tiffinfo={270: "x" * 100_000})
    assert np.array_equal(rgb(tagged), rgb(plain))
    webp = {"lossless": True, "exif": b"Exif\0\0" + bytes(100_000), "icc_profile": bytes(300_000)}
    assert np.array_equal(rgb(encode(image, "WEBP", **webp)), rgb(encode(image, "WEBP", lossless=True)))
    jpeg = encode(image, "JPEG")
    assert np.array_equal(rgb(encode(image, "JPEG", icc_profile=bytes(1_000_000))), rgb(jpeg))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_any_order_and_width_of_places_is_read_or_refused(order: str, big: bool) -> None:
    if big and order == ">":
        assert refusal(tiff([{"pixels": RGB}], order, big))[0] == "unsupported-image"
        return
    assert np.array_equal(rgb(tiff([{"pixels": RGB}], order, big)), RGB)
    assert np.array_equal(rgb(tiff([{"pixels": GRAY16}], order, big))[..., 0], GRAY)


def test_a_planar_and_a_cmyk_tiff_are_read() -> None:
    height, width = GRAY.shape
    strips = {256: width, 257: height, 258: [8, 8, 8], 262: 2, 277: 3, 284: 2, 278: height, 279: [GRAY.size] * 3}
    planes = np.ascontiguousarray(RGB.transpose(2, 0, 1)).reshape(-1, width)
    planar = tiff([{"pixels": planes, "tags": strips | {273: [8 + GRAY.size * plane for plane in range(3)]}}])
    assert np.array_equal(rgb(planar), RGB)
    cmyk = encode(tissue().convert("CMYK"), "TIFF")
    assert np.array_equal(rgb(cmyk), np.asarray(tissue().convert("CMYK").convert("RGB")))


TIFFS = {
    "float grey": ({"pixels": GRAY.astype(np.float32), "tags": {339: 3}}, "with floating-point samples"),
    "float RGB": ({"pixels": RGB.astype(np.float32), "tags": {339: [3, 3, 3]}}, "with floating-point samples"),
    "signed bytes": ({"pixels": GRAY.astype(np.int8), "tags": {339: 2}}, "with signed samples"),
    "fax": ({"pixels": GRAY, "tags": {259: 4}}, "compressed with CCITT group 4"),
    "LERC": ({"pixels": GRAY, "tags": {259: 34887}}, "compressed with LERC"),
    "WebP": ({"pixels": RGB, "tags": {259: 50001}}, "compressed with WebP"),
    "an unknown method": ({"pixels": RGB, "tags": {259: 4711}}, "compressed with method 4711"),
    "raw camera data": ({"pixels": GRAY, "tags": {262: 32803}}, "that holds a camera's raw data"),
    "YCbCr": ({"pixels": RGB, "tags": {262: 6}}, "in YCbCr, which Pillow 11.3.0 may not survive"),
    "64 bits": ({"pixels": GRAY.astype(np.uint64)}, "of 1 samples of 64 bits"),
    "grey and 16-bit alpha": ({"pixels": np.stack([GRAY16, GRAY16], -1), "tags": {262: 1, 338: 2}}, "of 2 samples of"),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiffs_that_are_not_read_say_what_they_are(kind: str) -> None:
    page, found = TIFFS[kind]
    rule, said = refusal(tiff([page]))
    assert rule == "unsupported-image"
    assert found in said


BLACK8 = [*range(256), *range(256), *range(256)]
PLANES16 = {258: [16] * 3, 262: 2, 277: 3, 284: 2, 256: 96, 257: 64, 278: 64, 279: [12288] * 3}
BROKEN_TIFFS = {
    "more rows than strips": ({257: 84}, "unreadable-image", "lacks some of its strips or tiles"),
    "strips beyond the end": ({273: 600}, "unreadable-image", "ends before its pixels do"),
    "a strip far beyond the end": ({273: 2**31}, "unreadable-image", "ends before its pixels do"),
    "wider than its bytes": ({256: 2**30}, "unreadable-image", "ends before its pixels do"),
    "a strip left out": ({273: 0}, "unsupported-image", "strips or tiles are left out"),
    "tiles of no size": ({322: 0, 323: 0}, "unreadable-image", "strips or tiles of no size"),
    "compressed beyond the end": ({259: 5, 279: 10**6}, "unreadable-image", "ends before its pixels do"),
    "a palette of 8 bits": ({262: 3, 320: BLACK8}, "unsupported-image", "a palette of 8-bit colours"),
}


@pytest.mark.parametrize("kind", BROKEN_TIFFS)
@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_without_all_its_pixels_is_refused_and_nothing_else_is_taken_for_them(kind: str, big: bool) -> None:
    tags, rule, found = BROKEN_TIFFS[kind]
    # The directory of a truncated file may lie before the pixels; what is decoded has one behind them.
    answer = refusal(tiff([{"pixels": GRAY, "tags": tags}], big=big))
    assert answer[0] == rule and found in answer[1]


def test_16_bits_in_separate_planes_are_unsupported() -> None:
    planes = np.concatenate([GRAY16] * 3)
    data = tiff([{"pixels": planes, "tags": PLANES16 | {273: [8 + GRAY16.nbytes * plane for plane in range(3)]}}])
    assert refusal(data) == ("unsupported-image", "a TIFF file of 16 bits in separate planes")


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_12_bits_in_16_of_colours_are_counted_and_not_scaled(kind: str) -> None:
    levels = np.stack([GRAY.astype(np.uint16) * 16] * 3, -1)
    data = tiff([{"pixels": levels}])
    if kind == "PNG":
        header = struct.pack(">IIBBBBB", 96, 64, 16, 2, 0, 0, 0)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in parts)
    assert examine_image(data).oddities == ["levels_below_4096"] == check_image(data)
    with pytest.raises(ImageError, match="16-bit colours with levels below 4,096") as error:
        examine_image(data, scale_levels=True)
    assert error.value.rule == "unsupported-image"
    assert examine_image(tiff([{"pixels": levels * 16}])).oddities == []


def test_an_ndpi_is_called_a_slide() -> None:
    rule, found = refusal(tiff([{"pixels": RGB, "tags": {65420: 1}}]))
    assert (rule, found) == ("unsupported-image", "a Hamamatsu NDPI slide")


def test_of_a_tiff_the_picture_is_taken_and_not_its_thumbnail() -> None:
    small = {"pixels": np.ascontiguousarray(RGB[::4, ::4])}
    tagged = {**small, "tags": {254: 1}}
    large = {"pixels": RGB}
    other = {"pixels": np.ascontiguousarray(RGB[::-1])}
    for pages, further in (([tagged, large], False), ([small, large], True), ([large, tagged], False)):
        data = tiff(pages)
        assert np.array_equal(rgb(data), RGB)
        assert ("further_pages" in examine_image(data).oddities) == further
    assert np.array_equal(rgb(tiff([large, other])), RGB)  # pages of one size: the first
    assert np.array_equal(rgb(tiff([tagged])), RGB[::4, ::4])  # there is no other


def test_a_ring_of_directories_ends() -> None:
    data = bytearray(tiff([{"pixels": RGB}]))
    data[-4:] = struct.pack("<I", struct.unpack_from("<I", data, 4)[0])
    assert np.array_equal(rgb(bytes(data)), RGB)


OTHERS = {
    "DICOM": (bytes(128) + b"DICM" + bytes(200), "a DICOM file", "unsupported-image"),
    "DICOM without preamble": (b"\x08\0\x05\0CS\x0a\0ISO_IR 100", "a DICOM file", "unsupported-image"),
    "QOI": (b"qoif" + bytes(200), "a QOI file", "unsupported-image"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(200), "a HEIC file", "unsupported-image"),
    "AVIF": (b"\0\0\0\x18ftypavif" + bytes(200), "an AVIF file", "unsupported-image"),
    "PDF": (b"%PDF-1.7\n" + bytes(200), "a PDF file", "unsupported-image"),
    "SVG": (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "an SVG file", "unsupported-image"),
    "JPEG XL": (b"\xff\x0a" + bytes(200), "a JPEG XL file", "unsupported-image"),
    "zip": (b"PK\x03\x04" + bytes(200), "a zip archive", "unsupported-image"),
    "HTML": (b"\xef\xbb\xbf \n<!DOCTYPE html><html>", "an HTML page in place of the picture", "unreadable-image"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "unreadable-image"),
    "annex": (b"/annex/objects/MD5E-s4--x.png\n", "a git-annex pointer", "unreadable-image"),
    "zeros": (bytes(5000), "5000 bytes that begin with zeros", "unreadable-image"),
    "nothing": (b"", "an empty file", "unreadable-image"),
    "text": (b"no picture", "10 bytes that are no known image format", "unreadable-image"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_no_image_we_read_is_named_by_what_it_is(kind: str) -> None:
    data, found, rule = OTHERS[kind]
    assert refusal(data)[0] == rule
    assert found in refusal(data)[1]


def test_tiles_of_jpeg_2000_are_refused_as_long_as_pillow_may_not_survive_them() -> None:
    whole = encode(tissue(), "JPEG2000")
    assert np.array_equal(rgb(whole), RGB)
    tiled = encode(tissue(), "JPEG2000", tile_size=(32, 32))
    assert "in tiles" in refusal(tiled)[1]


def test_odd_pictures_are_counted() -> None:
    clear = tissue().convert("RGBA")
    clear.putalpha(0)
    frames = {"save_all": True, "append_images": [tissue().rotate(90)]}
    found = {
        "one colour": Image.new("RGB", (40, 40), (1, 2, 3)),
        "one pixel": Image.new("L", (1, 1)),
        "tiny": tissue(15, 20),
        "usual": tissue(),
    }
    assert {kind: examine_image(encode(image, "PNG")).oddities for kind, image in found.items()} == {
        "one colour": ["one_color"],
        "one pixel": ["tiny", "one_color"],
        "tiny": ["tiny"],
        "usual": [],
    }
    assert examine_image(encode(clear, "PNG")).oddities == ["transparent", "one_color"]
    for kind in ("PNG", "GIF", "WEBP", "TIFF"):
        assert "further_pages" in examine_image(encode(tissue(), kind, **frames)).oddities, kind
    assert examine_image(encode(Image.new("RGB", (40, 40), (90, 90, 90)), "JPEG")).oddities == ["one_color"]
