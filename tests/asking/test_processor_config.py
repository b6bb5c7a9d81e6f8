"""What a model folder says of text and images is what was prepared, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import MAX_SEQ_LEN, NUM_IMAGE_TOKENS, REPO_ROOT, tiny_model_folder

from composer_path import PathMLLM
from composer_path.asking.processor_config import read_processor_config
from composer_path.hugging_face.image_token import with_image_token
from composer_path.hugging_face.processor_folder import PROCESSOR_CONFIG, write_processor
from composer_path.images.pixels import ImagePreparation, pad_color_of
from composer_path.records.prompts import get_template
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PathMLLM:
    return PathMLLM.from_pretrained(tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model"))


@pytest.mark.parametrize("template", ["plain", {"name": "llava_llama_2", "system": "Be brief."}])
def test_both_preparations_come_back_as_they_were(model: PathMLLM, tmp_path: Path, template: Any) -> None:
    text = TextPreparation(get_template(template), NUM_IMAGE_TOKENS, MAX_SEQ_LEN, "inline")
    color = pad_color_of(model.vision_encoder.mean)
    images = ImagePreparation(32, "crop", "torchvision", color, 1000)
    tokenizer, token = with_image_token(load_tokenizer(REPO_ROOT / "test_data" / "tokenizer"))
    encoder = model.vision_encoder
    write_processor(tmp_path, tokenizer, text, images, token.text, (encoder.mean, encoder.std))
    assert json.loads((tmp_path / PROCESSOR_CONFIG).read_text())["template"] == template
    assert read_processor_config(tmp_path, model) == (text, images)


def test_a_folder_of_an_earlier_version_has_the_usual_limit_of_pixels(model: PathMLLM, tmp_path: Path) -> None:
    settings = {"template": "plain", "image_position": "front", "max_seq_len": 128, "fit": "pad", "decoder": "pil"}
    (tmp_path / PROCESSOR_CONFIG).write_text(json.dumps(settings))
    assert read_processor_config(tmp_path, model)[1].max_pixels == ImagePreparation.max_pixels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no processor_config.json"),
        ("{", "must be one JSON object; found .* in line 1"),
        ('{"template": "plain", "template": "plain"}', "found the key 'template' twice"),
        ('{"max_seq_len": NaN}', "found NaN, which is no number"),
        ("[]", "must be one JSON object; found a list"),
        ('{"template": "plain"}', r"lacks \['decoder', 'fit', 'image_position', 'max_seq_len'\]"),
        (
            '{"a": 1, "template": "plain", "image_position": "front", "max_seq_len": 9, "fit": "pad", "decoder": ""}',
            r"unknown keys \['a'\]",
        ),
        (
            '{"template": "plain", "image_position": "front", "max_seq_len": 64, "fit": "pad", "decoder": "pil"}',
            "max_seq_len must be the model's 128; found 64",
        ),
        (
            '{"template": "plainn", "image_position": "front", "max_seq_len": 128, "fit": "pad", "decoder": "pil"}',
            "did you mean 'plain'",
        ),
    ],
)
def test_another_content_is_refused(model: PathMLLM, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / PROCESSOR_CONFIG).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_processor_config(tmp_path, model)
