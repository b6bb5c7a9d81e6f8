"""Language models from folders and configurations: dtypes, empty starts, tied embeddings, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from composer_path.models.language_model import load_language_model_config, untrained_language_model
from composer_path.models.parameters import cast_parameters

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers writes it."""
    place = tmp_path_factory.mktemp("llama")
    torch.manual_seed(5)
    untrained_language_model(config=LLAMA).save_pretrained(place)
    return place


def test_only_parameters_take_the_dtype_ropes_frequencies_stay_fp32() -> None:
    for model in (
        untrained_language_model(config=LLAMA, dtype=torch.bfloat16),
        cast_parameters(untrained_language_model(config=LLAMA), torch.bfloat16),
    ):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        frequencies = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
        assert frequencies and {buffer.dtype for buffer in frequencies} == {torch.float32}
        exact = 1 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
        torch.testing.assert_close(frequencies[0], exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_an_empty_model_has_meta_parameters_real_buffers_and_the_same_ties(tied: bool) -> None:
    model = untrained_language_model(config={**LLAMA, "tie_word_embeddings": tied}, empty=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    buffers = dict(model.named_buffers())
    assert buffers and {buffer.device.type for buffer in buffers.values()} == {"cpu"}
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    full = untrained_language_model(config={**LLAMA, "tie_word_embeddings": tied})
    assert len(list(model.parameters())) == len(list(full.parameters()))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}


def test_random_weights_come_from_the_seed() -> None:
    torch.manual_seed(1)
    first = untrained_language_model(config=LLAMA).state_dict()
    torch.manual_seed(1)
    second = untrained_language_model(config=LLAMA).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_configuration_comes_from_keys_a_file_or_a_folder(folder: Path) -> None:
    for source in (LLAMA, str(folder), str(folder / "config.json")):
        config = load_language_model_config(source)
        assert (config.model_type, config.hidden_size, config.num_key_value_heads) == ("llama", 32, 2)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"config": "not/there.json"}, "'not/there.json' does not exist"),
        ({"config": SIZES}, "'model_type' is missing"),
    ],
)
def test_what_can_not_be_built_is_said(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        untrained_language_model(**keywords)
