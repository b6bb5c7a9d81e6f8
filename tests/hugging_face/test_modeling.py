"""The model that transformers runs is PathMLLM: the same numbers, tokens and files, for every make of its parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import ENCODERS, LLAMA, PROJECTORS, exported, prompt_of, tiny_path_mllm, two_images
from safetensors.torch import load_file, save_file
from tiny_language_models import CASES, tiny
from torch import Tensor
from transformers import AutoModelForImageTextToText

from composer_path import PathMLLM
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR
from composer_path.weights.tensor_file import WeightsError

WORDS = [[1, 5, 6], [7, 8, 9], [10, 11]]
DTYPE = "dtype" if TRANSFORMERS_MAJOR >= 5 else "torch_dtype"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported")
    exported(tiny_path_mllm(), place)
    return place


def loaded(folder: Path, **keywords: Any) -> Any:
    """As a user of transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(folder, **keywords)


def logits_of_path_mllm(model: PathMLLM, images: Tensor) -> Tensor:
    """Of the prompt as one packed row, as in training."""
    ids = prompt_of(model, WORDS, -200)
    length = len(ids)
    with torch.no_grad():
        return model(
            input_ids=ids,
            position_ids=torch.arange(length),
            cu_seq_lens=torch.tensor([0, length], dtype=torch.int32),
            max_seq_len=length,
            pixel_values=images,
            image_index=(ids < 0).nonzero()[:, 0],
        )


def assert_same_model(model: PathMLLM, theirs: Any) -> None:
    """Logits within 1e-5 , and the same tokens one after the other with a cache."""
    images, id = two_images(model), theirs.config.image_token_id
    ids = prompt_of(model, WORDS, id)[None]
    with torch.no_grad():
        found = theirs(input_ids=ids, pixel_values=images).logits[0]
    expected = logits_of_path_mllm(model, images)
    scale = expected.abs().max().clamp(min=1.0)
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=0)
    keywords = {"max_new_tokens": 8, "suppress_tokens": [id], "eos_token_id": 2, "pad_token_id": 0}
    ours = model.generate(prompt_of(model, WORDS, -200), images, **keywords)
    new = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images, do_sample=False, **keywords
    )[0, ids.shape[1] :]
    assert new.tolist() == ours.tolist()


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_kind_of_encoder_and_projector_computes_what_path_mllm_does(
    tmp_path: Path, encoder: str, projector: str
) -> None:
    """Also where transformers builds without storage and overwrites the buffers that no file holds."""
    model = exported(tiny_path_mllm(encoder, projector), tmp_path)
    assert_same_model(model, loaded(tmp_path))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_language_model_that_is_taken_computes_what_path_mllm_does(tmp_path: Path, name: str, kind: str) -> None:
    config = tiny(name, kind)
    if TRANSFORMERS_MAJOR < 5 and name in ("gpt2", "granitemoe", "olmoe"):
        pytest.skip("refused there")
    model = exported(tiny_path_mllm(language_model=config), tmp_path)
    assert_same_model(model, loaded(tmp_path))


@pytest.mark.parametrize("tie", [True, False])
def test_what_transformers_saves_is_what_was_exported_bit_for_bit(tmp_path: Path, tie: bool) -> None:
    exported(tiny_path_mllm(language_model=LLAMA | {"tie_word_embeddings": tie}), tmp_path / "a")
    loaded(tmp_path / "a").save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert ("language_model.lm_head.weight" in before) is not tie
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0] == configs[1]
    again = PathMLLM.from_pretrained(tmp_path / "b")
    again.save_pretrained(tmp_path / "c")
    third = load_file(tmp_path / "c" / "model.safetensors")
    assert before.keys() == third.keys() and all(torch.equal(before[key], third[key]) for key in before)
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == configs[0]


def test_answers_of_a_batch_that_is_filled_up_at_the_left_are_those_of_each_alone(folder: Path) -> None:
    model, theirs = PathMLLM.from_pretrained(folder), loaded(folder)
    images, id = two_images(model), theirs.config.image_token_id
    prompts = [[[1, 5], [7, 8, 9, 10, 11]], [[1, 5, 6]], [[1, 12], [13], [14]]]
    shown = [images[:1], images[:0], images]
    keywords = {"max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": [id]}
    alone = [
        model.generate(prompt_of(model, words, -200), own, **keywords).tolist()
        for words, own in zip(prompts, shown, strict=True)
    ]
    rows = [prompt_of(model, words, id) for words in prompts]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    new = theirs.generate(
        input_ids=ids, attention_mask=mask, pixel_values=torch.cat(shown), do_sample=False, **keywords
    )[:, longest:]
    for row, expected in zip(new.tolist(), alone, strict=True):
        assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {0}


def test_several_answers_to_a_prompt_of_several_images_each_see_its_images(folder: Path) -> None:
    """Drawn from the likeliest token alone they are all the greedy one."""
    model, theirs = PathMLLM.from_pretrained(folder), loaded(folder)
    images, id = two_images(model), theirs.config.image_token_id
    ids = prompt_of(model, WORDS, id)[None]
    shared = {"max_new_tokens": 4, "eos_token_id": 95, "pad_token_id": 0}
    one = theirs.generate(input_ids=ids, pixel_values=images, **shared)
    other = theirs.generate(input_ids=ids, pixel_values=images.flip(0), **shared)
    assert not torch.equal(one, other)
    drawn = {"do_sample": True, "num_return_sequences": 2, "top_k": 1}
    both = theirs.generate(
        input_ids=torch.cat([ids, ids]), pixel_values=torch.cat([images, images.flip(0)]), **shared, **drawn
    )
    assert torch.equal(both, torch.cat([one, one, other, other]))


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_changes_no_token(folder: Path, use_cache: bool) -> None:
    model, theirs = PathMLLM.from_pretrained(folder), loaded(folder)
    images = two_images(model)
    ids = prompt_of(model, WORDS, theirs.config.image_token_id)[None]
    new = theirs.generate(input_ids=ids, pixel_values=images, max_new_tokens=6, use_cache=use_cache, eos_token_id=95)
    assert (
        new[0, ids.shape[1] :].tolist()
        == model.generate(
            prompt_of(model, WORDS, -200), images, max_new_tokens=6, eos_token_id=95, pad_token_id=0
        ).tolist()
    )


def test_normalised_pixels_give_what_bytes_give(folder: Path) -> None:
    theirs = loaded(folder)
    model = PathMLLM.from_pretrained(folder)
    images = two_images(model)
    encoder = model.vision_encoder
    mean, std = (torch.tensor(value)[:, None, None] for value in (encoder.mean, encoder.std))
    floats = (images.float() / 255 - mean) / std
    torch.testing.assert_close(theirs.get_image_features(floats), theirs.get_image_features(images), atol=1e-5, rtol=0)


def test_labels_give_the_mean_loss_of_their_tokens(folder: Path) -> None:
    theirs, model = loaded(folder), PathMLLM.from_pretrained(folder)
    images, id = two_images(model), theirs.config.image_token_id
    ids = prompt_of(model, WORDS, id)[None]
    labels = ids.clone()
    labels[:, :-2] = -100
    output = theirs(input_ids=ids, pixel_values=images, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, -3:-1], ids[0, -2:])
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.projector.parameters())


@pytest.mark.parametrize("where", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_changes_nothing(folder: Path, where: Any) -> None:
    assert_same_model(PathMLLM.from_pretrained(folder), loaded(folder, device_map=where))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_in_bf16_only_parameters_are_cast(tmp_path: Path, encoder: str) -> None:
    """A table of positions in bf16 would turn tokens by radians."""
    exported(tiny_path_mllm(encoder), tmp_path)
    theirs, ours = loaded(tmp_path, **{DTYPE: torch.bfloat16}), PathMLLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    buffers = dict(theirs.named_buffers())
    in_files = set(ours.state_dict())
    for name, buffer in ours.named_buffers():
        if name not in in_files:
            assert buffers[name].dtype == torch.float32 and torch.equal(buffers[name], buffer), name
    images = two_images(ours)
    ids = prompt_of(ours, WORDS, theirs.config.image_token_id)[None]
    with torch.no_grad():
        found = theirs(input_ids=ids, pixel_values=images).logits[0].float()
        expected = logits_of_path_mllm(ours, images).float()
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


def test_another_number_of_image_tokens_than_of_vectors_is_told_with_both(folder: Path) -> None:
    theirs, model = loaded(folder), PathMLLM.from_pretrained(folder)
    ids = prompt_of(model, WORDS, theirs.config.image_token_id)[None]
    each = model.num_image_tokens()
    message = rf"{2 * each} image tokens \(id 96\) in the input for 1 images of {each} vectors each, {each} in all"
    with pytest.raises(ValueError, match=message):
        theirs(input_ids=ids, pixel_values=two_images(model)[:1])
    with pytest.raises(ValueError, match=r"6 image tokens .* for 0 images"):
        theirs.generate(input_ids=ids, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"0 image tokens .* for 2 images"):
        theirs.generate(input_ids=ids[:, :3], pixel_values=two_images(model), max_new_tokens=2)


@pytest.mark.parametrize("change", ["missing", "left over", "other shapes"])
def test_tensors_that_do_not_fit_are_an_error_by_name(folder: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "projector.mlp.0.weight"
    if change == "missing":
        del tensors[name]
    elif change == "left over":
        name = "projector.mlp.9.weight"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"doesn't fit the model. {change} \(1\): {name}"):
        loaded(tmp_path)


def test_a_folder_of_the_first_version_loads_and_asks_for_a_new_export_where_images_are_shown(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    vision = {key: value for key, value in config["vision_config"].items() if key != "model_type"}
    first = {"model_type": "composer_path", "version": 1, "vision_encoder": vision}
    first |= {"projector": config["projector_config"], "language_model": config["text_config"]}
    (tmp_path / "config.json").write_text(json.dumps(first))
    model, theirs = PathMLLM.from_pretrained(tmp_path), loaded(tmp_path)
    text = torch.tensor([[1, 5, 6]])
    torch.testing.assert_close(
        theirs(input_ids=text).logits[0], model.language_model(input_ids=text).logits[0], atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="of version 1; export the model again"):
        theirs(input_ids=text, pixel_values=two_images(model))
