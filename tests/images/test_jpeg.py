"""A JPEG that lacks pixels is found although decoders take it; a whole one is not, whatever wrote it."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from composer_path.images.file import check_image, sanitize_image
from composer_path.images.jpeg import Jpeg
from composer_path.records.rules import ImageError

END = b"\xff\xd9"
KINDS = {
    "4:2:0": {},
    "4:4:4": {"subsampling": 0},
    "quality 100": {"quality": 100, "subsampling": 0},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "restart markers": {"restart_marker_rows": 2},
    "progressive": {"progressive": True},
    "progressive grey": {"progressive": True, "mode": "L"},
    "rotated": {"orientation": 6},
}


@pytest.fixture(scope="module")
def tissue(repo_root: Path) -> Image.Image:
    """Four real tiles beside each other, 320 pixels a side."""
    paths = sorted((repo_root / "test_data" / "imgs").glob("*_160.jpg"))[-4:]
    mosaic = Image.new("RGB", (320, 320))
    for place, path in enumerate(paths):
        mosaic.paste(Image.open(path), (place % 2 * 160, place // 2 * 160))
    return mosaic


def encode(image: Image.Image, mode: str = "RGB", orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def scans(data: bytes) -> list[tuple[int, int]]:
    """First byte and end of each scan's coded data, found byte by byte."""
    found, position = [], 2
    while data[position : position + 2] != END:
        marker, length = struct.unpack(">xBH", data[position : position + 4])
        position += 2 + length
        if marker == 0xDA:
            start = position
            while data[position] != 0xFF or data[position + 1] in {0, *range(0xD0, 0xD8)}:
                position += 1
            found.append((start, position))
    return found


def ending_at(data: bytes, position: int) -> bytes:
    return data[:position].rstrip(b"\xff") + END


def is_refused(data: bytes) -> bool:
    found = []
    for check in (check_image, sanitize_image):
        try:
            check(data)
        except ImageError as error:
            found.append(error.rule)
    assert len(found) in (0, 2), "a check and a conversion see the same"
    return found == ["unreadable-image"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_scan_data_that_end_early_are_refused_though_decoders_take_them(kind: str, tissue: Image.Image) -> None:
    data = encode(tissue, **KINDS[kind])
    start, end = scans(data)[-1]
    assert not is_refused(data)
    for share in (0.01, 0.3, 0.5, 0.8, 0.95, 0.99):
        early = ending_at(data, start + int(share * (end - start)))
        Image.open(io.BytesIO(early)).load()  # no error: this is why it must be found here
        assert is_refused(early), share


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_says_whether_it_has_its_end(kind: str, tissue: Image.Image) -> None:
    data = encode(tissue, **KINDS[kind])
    assert Jpeg(data).ended
    assert not Jpeg(data.removesuffix(END)).ended
    assert Jpeg(data.removesuffix(END)).stripped().endswith(END)  # decoding tells whether the data are all there


@pytest.mark.parametrize("kind", ["4:2:0", "grey", "progressive"])
def test_an_end_marker_in_the_middle_of_the_data_is_refused(kind: str, tissue: Image.Image) -> None:
    data = bytearray(encode(tissue, **KINDS[kind]))
    start, end = scans(bytes(data))[-1]
    middle = (start + end) // 2
    data[middle : middle + 2] = END
    assert is_refused(bytes(data))


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "progressive", "progressive grey"])
def test_what_is_not_found_are_the_last_two_blocks_at_most(kind: str, tissue: Image.Image) -> None:
    data = encode(tissue, **KINDS[kind])
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    side = 2 * 16  # two blocks, at half resolution in colour
    for cut in range(1, 25):
        early = ending_at(data, scans(data)[-1][1] - cut)
        if not is_refused(early):
            pixels = np.array(Image.open(io.BytesIO(early)).convert("RGB"))
            pixels[-side:, -side:] = whole[-side:, -side:]
            assert (pixels == whole).all(), cut


def test_a_progressive_file_without_its_last_scans_is_refused(tissue: Image.Image) -> None:
    data = encode(tissue, progressive=True)
    found = scans(data)
    assert len(found) > 5
    for _, end in found[:-1]:
        assert is_refused(ending_at(data, end))
        with pytest.raises(ImageError, match="lacks some of its scans"):
            sanitize_image(ending_at(data, end), decode=False)  # its structure says so


@pytest.mark.parametrize("kind", ["4:2:0", "progressive"])
def test_bytes_after_the_end_are_no_damage(kind: str, tissue: Image.Image) -> None:
    data = encode(tissue, **KINDS[kind])
    thumbnail = encode(tissue.resize((32, 32)))
    for trailing in (b"\0" * 64, thumbnail, thumbnail[:300], b"\xff\xd0\xff\xda"):  # padding, a second picture, junk
        assert not is_refused(data + trailing)
        assert sanitize_image(data + trailing) == sanitize_image(data)


def test_a_restart_in_a_file_without_restarts_is_refused(tissue: Image.Image) -> None:
    data = bytearray(encode(tissue))
    start, end = scans(bytes(data))[0]
    middle = (start + end) // 2
    data[middle : middle + 2] = b"\xff\xd3"  # decoders fill up with grey from here on
    Image.open(io.BytesIO(bytes(data))).load()
    for decode in (True, False):
        with pytest.raises(ImageError, match="has a restart where there can be none"):
            sanitize_image(bytes(data), decode=decode)


def test_the_check_does_not_hang_on_an_option_that_makes_pillow_lenient(
    tissue: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # some libraries set it for all
    data = encode(tissue)
    assert is_refused(ending_at(data, len(data) // 2))
    assert not is_refused(data)


def test_every_real_jpeg_at_hand_is_whole(repo_root: Path) -> None:
    folders = [repo_root / "test_data" / "imgs", Path(os.environ.get("COMPOSER_PATH_HISTOLOGY", "nowhere"))]
    paths = [path for folder in folders for path in folder.rglob("*.jpg")]
    assert len(paths) > 100
    for path in paths:
        check_image(path.read_bytes())
        assert is_refused(ending_at(path.read_bytes(), path.stat().st_size * 9 // 10)), path.name
