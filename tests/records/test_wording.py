"""What a text speaks of: directions keep an image's orientation, sizes its scale."""

from __future__ import annotations

import pytest

from composer_path.records.wording import Wording, wording_of


def spoken(text: str) -> Wording:
    return wording_of({"turns": [["human", "<image>\nWhat is seen?"], ["assistant", text]], "system": None})


@pytest.mark.parametrize(
    "text",
    [
        "The gland on the left is dilated.",
        "Upper RIGHT: a mitosis.",
        "The arrow points at a nucleus.",
        "Necrosis lies at 3 o'clock.",
        "At 10 o\u2019clock a vessel",
        "tumour at the top of the field",
        "See \u2191 here",
        "in the bottom-left corner",
        "counterclockwise rotation",
        "the vessel above the gland",
    ],
)
def test_directions_are_found(text: str) -> None:
    assert spoken(text).names_direction


@pytest.mark.parametrize(
    "text", ["At 40x magnification", "scanned at 0.25 mpp", "a focus of 3 mm", "nuclei of 12 \u00b5m", "20 \u00d7"]
)
def test_sizes_are_found(text: str) -> None:
    assert spoken(text).names_size


@pytest.mark.parametrize(
    "text", ["A basal cell carcinoma of the skin.", "This topic is updated.", "Invasive ductal carcinoma, grade 2."]
)
def test_other_words_speak_of_neither(text: str) -> None:
    assert spoken(text) == Wording(False, False)


def test_questions_and_the_system_message_are_read_too() -> None:
    assert wording_of({"turns": [["human", "What is on the left?"], ["assistant", "Fat"]], "system": None})[0]
    assert wording_of({"turns": [], "system": "Images are at 20x."}).names_size


@pytest.mark.parametrize("damaged", [None, 3, {"turns": None}, {"turns": [[1, None]]}])
def test_a_damaged_conversation_speaks_of_nothing(damaged: object) -> None:
    assert wording_of(damaged) == Wording(False, False)
