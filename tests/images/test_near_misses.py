"""A missing image is described by how a file that is there is named otherwise, and by no name."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from composer_path.images.folder import _listed, resolve_image
from composer_path.records.rules import RecordError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Sub").mkdir()
    for name in ("Sub/a b.jpg", unicodedata.normalize("NFC", "Müller.png"), "x.tiff", "Sub/é.PNG"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def found(name: str, folder: Path) -> tuple[str, str]:
    with pytest.raises(RecordError) as caught:
        resolve_image(name, folder)
    assert name.strip(" /") not in str(caught.value)
    return caught.value.rule, caught.value.found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Sub\\a b.jpg", "has '/' where it has"),
        ("Sub/a b.jpg ", "has no blanks at its ends"),
        (" Sub/a b.jpg\n", "has no blanks at its ends"),
        ("Sub/a%20b.jpg", "is spelled without % escapes"),
        (unicodedata.normalize("NFD", "Müller.png"), "encoded in another way"),
        ("sub/a b.jpg", "differs in capitals"),
        ("X.TIFF", "differs in capitals"),
        ("x.png", "has another ending"),
        ("x.tif", "has another ending"),
        ("sub\\A%20b.png ", "differs in several of these"),
        (unicodedata.normalize("NFD", "Sub/É.png"), "differs in several of these"),
        ("train/x.tiff", "without the folders before it"),
    ],
)
def test_a_near_miss_is_described_by_its_kind(name: str, words: str, folder: Path) -> None:
    rule, text = found(name, folder)
    assert rule == "missing-file"
    assert text.startswith("no such file, but one") and words in text, text


@pytest.mark.parametrize("name", ["y.png", "Sub/y.png", "nowhere/y.png", "Sub\\y.png", "%2e%2e/y.png", "x.tiff/y.png"])
def test_what_is_like_nothing_there_is_only_missing(name: str, folder: Path) -> None:
    (folder.parent / "y.png").write_bytes(b"x")
    assert found(name, folder) == ("missing-file", "no such file")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://a.org/x.tiff", "an address"),
        ("HTTP://a.org/x.tiff", "an address"),
        ("s3://bucket/x.tiff", "an address"),
        ("file:/x.tiff", "an address"),
        ("file:///x.tiff", "an address"),
        ("data:image/png;base64,iVBORw0KGgo", "a data URL"),
        (" data:,x", "a data URL"),
    ],
)
def test_an_address_is_refused_by_name(name: str, words: str, folder: Path) -> None:
    rule, text = found(name, folder)
    assert rule == "path-outside-folder" and text.startswith(words)


def test_a_name_with_a_colon_is_a_name(folder: Path) -> None:
    (folder / "slide:1.png").write_bytes(b"x")
    assert resolve_image("slide:1.png", folder).name == "slide:1.png"


def test_any_ending_is_the_only_one_that_is_there(folder: Path) -> None:
    assert resolve_image("x.*", folder).name == "x.tiff"
    assert resolve_image("Sub/é.*", folder).name == "é.PNG"
    assert found("y.*", folder)[1] == "no such file"
    (folder / "x.jpg").write_bytes(b"x")
    assert "files that differ in their endings" in found("x.*", folder)[1]


def test_a_folder_is_listed_once_for_many_missing_names(folder: Path) -> None:
    _listed.cache_clear()
    for number in range(50):
        found(f"missing {number}.png", folder)
    assert _listed.cache_info().misses == 1
