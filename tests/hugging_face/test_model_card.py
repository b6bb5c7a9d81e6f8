"""What a folder says of its model: generation settings equal to ask's, a card and metadata without places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_model import tiny_model_folder

from composer_path import Assistant
from composer_path.hugging_face.carried_code import packages_needed
from composer_path.hugging_face.provenance import Provenance
from composer_path.run.export import write_model
from composer_path.weights.tensor_file import read_metadata


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    folder = tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model")
    return Assistant.from_pretrained(folder, device="cpu")


def write(
    folder: Path, found: Assistant, provenance: Provenance | None = None, *, self_contained: bool = False
) -> None:
    weights, more = found.model.state_dict(), {"provenance": provenance, "self_contained": self_contained}
    write_model(folder, found.model, weights, found.tokenizer, found.text, found.images, **more)  # type: ignore[arg-type]


def test_the_card_and_each_file_say_where_the_model_comes_from(assistant: Assistant, tmp_path: Path) -> None:
    write(tmp_path, assistant, Provenance("liver | 2", 1200, ("projector", "language_model"), "abc"))
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    for fact in ("# liver \\| 2", "| Steps | 1,200 |", "| projector, language model |", "`<image>` (32000)", "float32"):
        assert fact in card, fact
    assert str(tmp_path) not in card and "/home" not in card
    metadata = read_metadata(tmp_path / "model.safetensors")
    assert (metadata["run"], metadata["step"], metadata["fingerprint"]) == ("liver | 2", "1200", "abc")
    assert metadata["format"] == "pt" and "composer_path" in metadata


def test_a_self_contained_folder_says_what_its_code_needs(assistant: Assistant, tmp_path: Path) -> None:
    """And without the word its successor carries none and says nothing of it."""
    write(tmp_path, assistant, self_contained=True)
    words = "`trust_remote_code=True` to\neach `from_pretrained`"
    card = (tmp_path / "README.md").read_text()
    assert words in card and "it needs torch, transformers, timm, sentencepiece." in card
    assert packages_needed("open_clip/ViT-B-32", tmp_path / "none")[-1] == "open_clip_torch"
    assert list(tmp_path.glob("*.py"))
    write(tmp_path, assistant)
    assert words not in (tmp_path / "README.md").read_text() and not list(tmp_path.glob("*.py"))
    assert "auto_map" not in (tmp_path / "config.json").read_text()


def test_answers_end_where_those_of_ask_do_and_hold_no_image(assistant: Assistant, tmp_path: Path) -> None:
    write(tmp_path, assistant)
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said["eos_token_id"] == assistant.end_ids() and said["max_new_tokens"] == 512
    assert said["suppress_tokens"] == [assistant.model.image_token_id] and said["do_sample"] is False


def test_a_card_of_ones_own_stays_and_ours_is_written_again(assistant: Assistant, tmp_path: Path) -> None:
    write(tmp_path, assistant)
    write(tmp_path, assistant, Provenance("another"))
    assert "# another" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    write(tmp_path, assistant)
    assert (tmp_path / "README.md").read_text() == "mine"
