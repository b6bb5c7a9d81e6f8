"""A model folder is read as it was written; one whose files don't belong together is refused, never guessed at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_model_folder
from torch import Tensor

from composer_path import Assistant, PathMLLM
from composer_path.weights.tensor_file import WeightsError

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change_config(folder: Path, name: str = "config.json", part: str | None = None, **values: object) -> None:
    content = json.loads((folder / name).read_text())
    (content if part is None else content[part]).update(values)
    (folder / name).write_text(json.dumps(content))


def change_weights(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({name: change(name, value) for name, value in load_file(file).items()}, file)


def test_a_configuration_that_ties_what_differs_is_refused(folder: Path) -> None:
    change_config(folder, part="text_config", tie_word_embeddings=True)
    with pytest.raises(WeightsError, match=r"tie_word_embeddings is true, but language_model\.lm_head\.weight differs"):
        PathMLLM.from_pretrained(folder)


def test_weights_of_several_dtypes_are_held_in_the_widest_of_their_module(folder: Path) -> None:
    change_weights(folder, lambda name, value: value.bfloat16() if "layers.0" in name else value)
    change_weights(folder, lambda name, value: value.bfloat16() if name.startswith("vision_encoder.") else value)
    model = PathMLLM.from_pretrained(folder)
    dtypes = {(name.partition(".")[0], value.dtype) for name, value in model.state_dict().items()}
    assert dtypes == {
        ("vision_encoder", torch.bfloat16),
        ("projector", torch.float32),
        ("language_model", torch.float32),
    }
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value.float(), stored[name].float()) for name, value in model.state_dict().items())
    answer = Assistant.from_pretrained(folder).answer([("human", "What?")], max_new_tokens=2)
    assert isinstance(answer, str)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_numbers_that_no_model_is_computed_with_are_refused(folder: Path, dtype: torch.dtype) -> None:
    change_weights(folder, lambda name, value: value.to(dtype) if "norm" in name else value)
    word = str(dtype).removeprefix("torch.")
    with pytest.raises(WeightsError, match=f"must be in fp32, bf16 or fp16; found {word} in "):
        PathMLLM.from_pretrained(folder)
    with pytest.raises(WeightsError, match=f"found {word} in "):
        PathMLLM.from_pretrained(folder, dtype=torch.float32)


def test_another_number_of_image_tokens_is_refused(folder: Path) -> None:
    change_config(folder, num_image_tokens=5)
    with pytest.raises(ValueError, match="num_image_tokens must be the model's 4; found 5"):
        PathMLLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [("config.json", {"image_token_id": 3}), ("processor_config.json", {"image_token": "</s>"})],
)
def test_files_that_name_different_image_tokens_are_refused(folder: Path, name: str, values: dict[str, object]) -> None:
    change_config(folder, name, **values)
    with pytest.raises(ValueError, match="one token must stand for an image"):
        Assistant.from_pretrained(folder)
