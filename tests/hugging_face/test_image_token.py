"""The token that stands for an image: one of its own, with a row, and added once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from exported_models import LLAMA, tiny_path_mllm
from safetensors.torch import load_file
from tiny_model import tiny_model_folder
from transformers import AddedToken

from composer_path import Assistant, Conversation, TextPreparation
from composer_path.hugging_face.image_token import ImageToken, with_image_row, with_image_token
from composer_path.records.conversation import Turn
from composer_path.records.prompts import get_template
from composer_path.records.vocabulary import check_vocabulary, load_tokenizer, save_tokenizer
from composer_path.run.export import write_model

TEXT = TextPreparation(get_template("llava_llama_2"), 3, None)


def asked(tokenizer: object, words: str = "What of <\u200bimage> and </s>?") -> list[int]:
    turns = (Turn("human", f"<image>\n{words}"), Turn("assistant", "Nothing."))
    return TEXT.tokenize(Conversation(turns=turns, images=("",)), tokenizer).input_ids.tolist()


def test_a_tokenizer_without_one_gets_the_next_id_in_a_copy(mistral_tokenizer_path: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(mistral_tokenizer_path)
    size = len(tokenizer)
    longer, token = with_image_token(tokenizer)
    assert token == ImageToken("<image>", size) and len(tokenizer) == size
    save_tokenizer(longer, tmp_path)
    again, same = with_image_token(load_tokenizer(tmp_path))
    assert same == token and len(again) == size + 1
    assert asked(again) == asked(tokenizer) == asked(longer)  # runs go on from it as they did


def test_a_tag_that_means_something_else_is_left_alone_and_another_name_is_taken_once(
    mistral_tokenizer_path: Path, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(mistral_tokenizer_path))
    tokenizer.add_tokens([AddedToken("<image>", special=False, normalized=False)])
    size = len(tokenizer)
    longer, token = with_image_token(tokenizer)
    assert token == ImageToken("<|image_pad|>", size)
    save_tokenizer(longer, tmp_path)
    assert with_image_token(load_tokenizer(tmp_path))[1] == token


def test_a_tokenizer_that_takes_no_token_is_refused(
    mistral_tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(mistral_tokenizer_path))  # the original may have its copy already
    monkeypatch.setattr(type(tokenizer), "add_tokens", lambda self, *args, **kwargs: 0)
    with pytest.raises(ValueError, match="must take one more token"):
        with_image_token(tokenizer)


@pytest.mark.parametrize("tie", [True, False])
def test_a_new_row_is_the_mean_and_the_model_stays_as_it_is(tie: bool) -> None:
    model = tiny_path_mllm(language_model=LLAMA | {"tie_word_embeddings": tie})
    before = copy.deepcopy(model.state_dict())
    longer = with_image_row(model.language_model, model.state_dict(), ImageToken("<image>", 97))
    embedding = longer["language_model.model.embed_tokens.weight"]
    assert embedding.shape == (98, 32) and longer["language_model.lm_head.weight"].shape == (98, 32)
    torch.testing.assert_close(embedding[96], before["language_model.model.embed_tokens.weight"].mean(0))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    enough = with_image_row(model.language_model, model.state_dict(), ImageToken("<image>", 95))
    assert all(enough[name].shape == value.shape for name, value in before.items())


def test_a_vocabulary_may_have_it_beyond_the_embeddings_of_a_model_that_is_trained(
    mistral_tokenizer_path: Path,
) -> None:
    """Whoever trains with an exported tokenizer, and the language model as it was."""
    longer, token = with_image_token(load_tokenizer(mistral_tokenizer_path))
    check_vocabulary(longer, token.id)
    longer.add_tokens(["another"])
    with pytest.raises(ValueError, match="found 1 tokens beyond"):
        check_vocabulary(longer, token.id)


def test_out_in_and_out_again_adds_nothing_more(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model")
    assistant = Assistant.from_pretrained(first, device="cpu")
    assert assistant.never_written == [assistant.model.image_token_id]
    weights = assistant.model.state_dict()
    write_model(tmp_path, assistant.model, weights, assistant.tokenizer, assistant.text, assistant.images)
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
    assert again.keys() == before.keys()
    assert {name for name in before if again[name] != before[name]} <= {
        "model.safetensors"
    }  # whose header has no order
    tensors = [load_file(folder / "model.safetensors") for folder in (first, tmp_path)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], value) for name, value in tensors[1].items())
