"""Finished squares in shards: the same pixels as the file they replace, or a clear refusal."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stored_images import load_stored_image, resize_image

from composer_path.images.file import check_image
from composer_path.images.pixels import PAD_COLOR, load_image
from composer_path.images.square import ResizedMismatch, Square, is_square, square_of
from composer_path.records.rules import ImageError


def pictures(golden: Path) -> dict[str, bytes]:
    """The golden pictures (tall, wide, grey, palette, transparent, ...) and one of EXIF-rotated pixels."""
    files = {path.name: path.read_bytes() for path in sorted((golden / "images").iterdir()) if path.suffix in SUFFIXES}
    assert len(files) >= 8
    rotated, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(rotated, "JPEG", exif=exif)
    return {**files, "rotated": rotated.getvalue()}


SUFFIXES = (".jpg", ".png", ".tif", ".tiff", ".bmp", ".webp")
COLOR = (1, 250, 77)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_stored_square_gives_exactly_the_pixels_of_its_file(golden: Path, fit: str) -> None:
    for name, data in pictures(golden).items():
        expected = load_image(data, 56, fit, "pil", COLOR)
        square = resize_image(data, 56, fit, COLOR)
        for decoder in ("pil", "torchvision"):
            assert torch.equal(load_stored_image(square, 56, fit, decoder, COLOR), expected), name
        assert torch.equal(load_stored_image(data, 56, fit, "pil", COLOR), expected), name
        assert square_of(square) == Square.of(56, fit, COLOR)


def test_a_loaded_square_may_be_written_to_and_leaves_the_stored_bytes(golden: Path) -> None:
    square = resize_image(next(iter(pictures(golden).values())), 28)
    before = bytes(square)
    load_stored_image(square, 28).zero_()
    assert square == before


def test_a_square_takes_its_pixels_and_16_bytes(golden: Path) -> None:
    assert len(resize_image(next(iter(pictures(golden).values())), 448)) == 3 * 448 * 448 + 16


def test_no_picture_is_taken_for_a_square_nor_a_square_for_a_picture(golden: Path) -> None:
    files = pictures(golden)
    for data in (*files.values(), b"", b"\xc5CPSQ"):
        assert not is_square(data)
    with pytest.raises(ImageError, match="no known image format"):
        check_image(resize_image(files["rotated"], 28))


@pytest.mark.parametrize(
    ("size", "fit", "color", "both"),
    [
        (56, "pad", PAD_COLOR, ("image_size 56", "image_size 28")),
        (28, "crop", PAD_COLOR, ("fit crop", "fit pad")),
        (28, "pad", COLOR, ("[1, 250, 77]", "[123, 116, 103]")),
    ],
)
def test_squares_made_for_another_model_end_the_run(
    golden: Path, size: int, fit: str, color: tuple[int, int, int], both: tuple[str, str]
) -> None:
    square = resize_image(pictures(golden)["rotated"], 28)
    with pytest.raises(ResizedMismatch) as caught:
        load_stored_image(square, size, fit, "pil", color)
    assert all(word in str(caught.value) for word in both)
    # A sample with an ImageError is left out and training goes on; here no sample is right.
    assert not isinstance(caught.value, ImageError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_padding_colour_counts_only_where_there_is_padding(golden: Path) -> None:
    square = resize_image(pictures(golden)["rotated"], 28, "crop", COLOR)
    assert load_stored_image(square, 28, "crop", "pil", PAD_COLOR).shape == (3, 28, 28)


@pytest.mark.usefixtures("without_type_checks")
def test_a_data_card_is_compared_as_a_whole() -> None:
    card = {"image_size": 448, "fit": "pad", "pad_color": [123, 116, 103]}
    assert Square.of(**card) == Square.of(448, "pad", PAD_COLOR) != Square.of(336, "pad", PAD_COLOR)
    assert Square.of(**{**card, "fit": "crop"}) == Square.of(448, "crop", None)
    with pytest.raises(ValueError, match="found 'stretch'"):
        Square.of(448, "stretch", None)


def test_damaged_squares_are_image_errors_and_later_versions_are_not(golden: Path) -> None:
    square = resize_image(pictures(golden)["rotated"], 28)
    for data in (square[:-1], square + b"\0", square[:10], square[:8], square[:8] + b"\1\7" + square[10:]):
        with pytest.raises(ImageError, match="truncated or damaged"):
            load_stored_image(data, 28)
    with pytest.raises(ResizedMismatch, match="version 1, found 2; update"):
        load_stored_image(square[:8] + b"\2" + square[9:], 28)
    with pytest.raises(ImageError, match="truncated or damaged"):
        load_stored_image(square[:8] + b"\0" + square[9:], 28)


def test_pictures_over_the_limit_are_not_resized(golden: Path) -> None:
    with pytest.raises(ImageError, match="too-many-pixels"):
        resize_image(pictures(golden)["rotated"], 28, max_pixels=100)


def test_training_reads_the_same_pixels_from_resized_shards_or_stops(tmp_path: Path, byte_level_tokenizer) -> None:
    from composer_path.batches.dataset import ConversationDataset
    from composer_path.conversion.convert import convert

    folder = Path(__file__).resolve().parents[2] / "test_data"
    records = json.loads((folder / "data.json").read_text())[:12]
    (tmp_path / "data.json").write_text(json.dumps(records))
    square = {"image_size": 28, "fit": "pad", "pad_color": list(COLOR)}
    convert(tmp_path / "data.json", folder / "imgs", tmp_path / "files")
    convert(tmp_path / "data.json", folder / "imgs", tmp_path / "squares", resized=square)

    def dataset(name: str, **changes: Any) -> ConversationDataset:
        keywords = {"image_size": 28, "pad_color": COLOR, "num_image_tokens": 2, "template": "llava_llama_2", **changes}
        return ConversationDataset(
            tokenizer=byte_level_tokenizer, local=str(tmp_path / name), batch_size=1, shuffle=False, **keywords
        )

    files, squares = dataset("files"), dataset("squares")
    for number in range(len(records)):
        assert torch.equal(squares[number]["pixel_values"], files[number]["pixel_values"])
        assert squares[number]["problem"] is None
    del files, squares
    with pytest.raises(ResizedMismatch, match=r"wants images with image_size 56.*resized to image_size 28"):
        dataset("squares", image_size=56)[0]
