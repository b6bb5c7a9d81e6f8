"""Rows added to embedding and head are means of the old ones, whichever way a model ties them."""

from __future__ import annotations

import pytest
import torch

from composer_path.models.vocabulary_rows import add_rows, tied_names
from composer_path.weights.language_folder import build_language_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "phi"])  # phi's head has a bias
def test_new_rows_are_means_and_old_ones_stay(tied: bool, model_type: str) -> None:
    model = build_language_model(config={"model_type": model_type, **TINY, "tie_word_embeddings": tied})
    old, ids = model.get_input_embeddings().weight.detach().clone(), torch.arange(3, 20)[None]
    before = model(input_ids=ids, attention_mask=None, **borders(17)).logits
    assert add_rows(model, 101) == 5 and add_rows(model, 90) == 0
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(embedding.weight[:96], old)
    torch.testing.assert_close(embedding.weight[96:], old.mean(0).expand(5, -1))
    assert (embedding.weight is head.weight) is tied is (tied_names(model) is not None)
    assert head.weight.shape == (101, 32) and model.config.vocab_size == 101
    after = model(input_ids=ids, **borders(17)).logits
    torch.testing.assert_close(after[..., :96], before)
    torch.testing.assert_close(after[..., 96], before.mean(-1), rtol=1e-4, atol=1e-5)  # a mean of rows gives it


def borders(length: int) -> dict[str, object]:
    ends = torch.tensor([0, length], dtype=torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}


@pytest.mark.parametrize("empty", [False, True])
def test_rows_are_added_where_they_are_asked_for_only(empty: bool) -> None:
    config = {"model_type": "llama", **TINY}
    asked = build_language_model(config=config, resize_embeddings=True, vocabulary=100, empty=empty)
    assert asked.get_input_embeddings().weight.shape == (100, 32)
    assert asked.get_input_embeddings().weight.is_meta is empty
    assert build_language_model(config=config, vocabulary=100, empty=empty).config.vocab_size == 96
