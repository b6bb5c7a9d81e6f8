"""A language model of a folder: transformers' own weights, no code of the folder's, and what is said of a wrong one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import PICKLES, write_zip
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from composer_path.weights.language_folder import build_language_model
from composer_path.weights.tensor_file import WeightsError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers writes it."""
    place = tmp_path_factory.mktemp("llama")
    torch.manual_seed(5)
    build_language_model(config=LLAMA).save_pretrained(place)
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_from_a_folder_equals_transformers_own(folder: Path, dtype: torch.dtype) -> None:
    ours = build_language_model(path=str(folder), dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype)
    frequencies = [buffer for name, buffer in ours.named_buffers() if name.endswith("inv_freq")]
    assert frequencies and {buffer.dtype for buffer in frequencies} == {torch.float32}
    assert ours.config._attn_implementation.startswith("packed_")
    for (name, value), (other, expected) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, expected), name


def test_an_empty_model_of_a_folder_reads_no_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = build_language_model(path=str(tmp_path), empty=True, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    with pytest.raises(WeightsError, match=r"holds none of model\.safetensors"):
        build_language_model(path=str(tmp_path))


def test_code_of_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"found 'unheard_of' with code of its own \(auto_map\), which is never run"):
        build_language_model(path=str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must be a model's configuration; found AttributeError"),
        ("{", "must be a model's configuration; found JSONDecodeError"),
        ("{}", "model_type must be one that transformers knows, found 'None'"),
        ('{"model_type": ["llama"]}', "model_type must be one that transformers knows"),
        ('{"model_type": "llama", "transformers_weights": "other.bin"}', "must not name other weights"),
    ],
)
def test_a_configuration_that_is_none_or_leads_elsewhere_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        build_language_model(path=str(tmp_path))


def test_an_adapter_is_no_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ValueError, match=r"found adapter_config\.json; merge the adapter"):
        build_language_model(path=str(tmp_path))


def test_pickled_weights_are_checked_before_transformers_reads_them(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = build_language_model(path=str(folder)).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    read = build_language_model(path=str(tmp_path)).state_dict()
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before torch 1\.6; convert it"):
        build_language_model(path=str(tmp_path))
    write_zip(tmp_path / "pytorch_model.bin", PICKLES["GLOBAL"](tmp_path / "ran"))
    with pytest.raises(ValueError, match=r"found the name 'posix\.mkdir'"):
        build_language_model(path=str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "give either 'path'"),
        ({"path": "somewhere", "config": LLAMA}, "give either 'path'"),
        ({"path": "not/there"}, "no config.json in 'not/there'"),
    ],
)
def test_what_can_not_be_built_is_said(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_language_model(**keywords)


# --- folders whose weights aren't the model's ------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]


def under_module(tensors: Tensors) -> Tensors:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def with_nan(tensors: Tensors) -> Tensors:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    return tensors


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "all names under module": (
        under_module,
        {},
        r"missing \(21\): lm_head.*left over \(21\): (model\.)?module\.lm_head",
    ),
    "no head": (without("lm_head.weight"), {}, r"missing \(1\): lm_head\.weight; take"),
    "a vision tower": (
        lambda tensors: tensors | {"model.vision_tower.x": torch.zeros(3)},
        {},
        r"left over \(1\): model\.vision_tower\.x; take",
    ),
    "more layers said": (dict, {"num_hidden_layers": 3}, r"missing \(9\): model\.layers\.2\."),
    "fewer layers said": (dict, {"num_hidden_layers": 1}, r"left over \(9\): model\.layers\.1\."),
    "another vocabulary": (
        dict,
        {"vocab_size": 100},
        r"other shapes \(2\): lm_head\.weight.*, model\.embed_tokens\.weight",
    ),
    "a NaN": (with_nan, {}, r"must be finite; found NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight; take"),
}


def altered(folder: Path, place: Path, change: Callable[[Tensors], Tensors], said: dict[str, Any]) -> str:
    shutil.copytree(folder, place, dirs_exist_ok=True)
    save_file(change(load_file(place / "model.safetensors")), place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | said))
    return str(place)


@pytest.mark.parametrize("kind", WRONG)
def test_weights_that_are_not_the_models_are_refused_with_a_list(folder: Path, tmp_path: Path, kind: str) -> None:
    change, said, message = WRONG[kind]
    with pytest.raises(WeightsError, match=message) as caught:
        build_language_model(path=altered(folder, tmp_path, change, said))
    assert "\n" not in str(caught.value)


def test_quantized_weights_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    said = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(WeightsError, match="must not be quantized; take its weights in bf16"):
        build_language_model(path=altered(folder, tmp_path, dict, said))


def test_buffers_that_older_versions_wrote_are_left_out(folder: Path, tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    model = build_language_model(path=altered(folder, tmp_path, lambda tensors: tensors | old, {}))
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize("content", [b"", b"abc", None])
def test_a_damaged_file_is_one_line(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(WeightsError, match=r"the weights in .* can't be read: Error while deserializing header"):
        build_language_model(path=str(tmp_path))


def test_a_shard_that_is_another_ones_copy_is_noticed(tmp_path: Path) -> None:
    """Transformers 4 believes the index, and leaves what isn't in the shard random without a word."""
    build_language_model(config=LLAMA).save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    names = sorted(load_file(second))
    shutil.copy(first, second)
    with pytest.raises(
        WeightsError, match=rf"names what isn't there: {names[0]} in {second.name}.*; copy the whole folder"
    ):
        build_language_model(path=str(tmp_path))
    second.unlink()
    with pytest.raises(WeightsError, match=rf"names files that aren't there: {second.name}"):
        build_language_model(path=str(tmp_path))
