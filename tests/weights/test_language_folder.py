"""A language model of a folder: transformers' own weights, no code of the folder's, and what is said of a wrong one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import PICKLES, write_zip
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from composer_path.models.attention import pack_attention
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
        ("[]", "must be one JSON object; found a list"),
        ("{", "must be one JSON object; found expecting property name"),
        ("{}", "model_type must be one that transformers knows, found 'None'"),
        ('{"model_type": ["llama"]}', "model_type must be one that transformers knows"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "found the key 'model_type' twice"),
        ('{"model_type": "llama", "rope_theta": NaN}', "found NaN, which is no number"),
        ("[" * 3000, "must be one JSON object; found RecursionError|found expecting value"),
        ('{"model_type": "llava"}', "must have a text_config"),
        ('{"model_type": "llama", "vocab_size": "32000"}', "vocab_size must not be '32000'"),
        ('{"model_type": "llama", "sliding_window": -1}', "sliding_window must be above 0"),
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


def under(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def with_nan(tensors: Tensors) -> Tensors:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    return tensors


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "an unknown prefix": (
        under("student."),
        {},
        r"missing \(21\): lm_head.*left over \(21\): (model\.)?student\.lm_head",
    ),
    "half of the names under a prefix": (
        lambda tensors: {(f"module.{name}" if "layers.1" in name else name): value for name, value in tensors.items()},
        {},
        r"missing \(9\): model\.layers\.1.*left over \(9\): (model\.)?module\.model\.layers\.1",
    ),
    "an adapter that wasn't merged": (
        lambda tensors: (
            tensors | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)}
        ),
        {},
        r"must be a whole model's, found an adapter's; merge the adapter",
    ),
    "quantized tensors": (
        lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.qweight": torch.zeros(4, 32, dtype=torch.int32)},
        {},
        r"must not be quantized; take its weights in bf16",
    ),
    "8-bit floats": (
        lambda tensors: {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()},
        {},
        r"must not be quantized, found float8_e4m3fn; take",
    ),
    "a tied head of its own": (
        dict,
        {"tie_word_embeddings": True},
        r"tie_word_embeddings is true, but lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "another type of model": (dict, {"model_type": "phi"}, r"missing \(\d+\): lm_head\.bias.*left over"),
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
    with pytest.raises(ValueError, match="must not be quantized; take its weights in bf16"):
        build_language_model(path=altered(folder, tmp_path, dict, said))


PREFIXES: dict[str, Callable[[Tensors], Tensors]] = {
    "module.": under("module."),
    "_orig_mod.": under("_orig_mod."),
    "module._orig_mod.": under("module._orig_mod."),
    "base_model.model.": under("base_model.model."),
    "module.base_model.model.": under("module.base_model.model."),
    "language_model.": under("language_model."),
    "model.": under("model."),
    "model.model.": under("model.model."),
    "model.language_model.": lambda tensors: {
        name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()
    },
    "model. doubled": lambda tensors: {name.replace("model.", "model.model.", 1): t for name, t in tensors.items()},
    "compiled inside": lambda tensors: {name.replace("model.", "model._orig_mod."): t for name, t in tensors.items()},
    "decoder without prefix": lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_training_programs_are_read(folder: Path, tmp_path: Path, prefix: str, tied: bool) -> None:
    leave = without("lm_head.weight") if tied else dict
    expected = load_file(folder / "model.safetensors")
    said = {"tie_word_embeddings": tied}
    path = altered(folder, tmp_path, lambda tensors: PREFIXES[prefix](leave(tensors)), said)
    read = build_language_model(path=path).state_dict()
    if tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], value) for name, value in expected.items())


def test_tensors_that_would_be_called_alike_are_refused(folder: Path, tmp_path: Path) -> None:
    twice = altered(folder, tmp_path, lambda tensors: tensors | {"model._orig_mod.norm.weight": torch.zeros(32)}, {})
    with pytest.raises(WeightsError, match=r"called alike in the model: model\._orig_mod\.norm\.weight, model\.norm"):
        build_language_model(path=twice)


TINY_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_VISION |= {"image_size": 28, "patch_size": 14}


@pytest.mark.parametrize("kind", ["llava", "llava_next", "gemma3"])
@pytest.mark.parametrize("old_names", [False, True])
def test_the_language_model_of_a_vision_language_folder_is_read(tmp_path: Path, kind: str, old_names: bool) -> None:
    text = {"llava": "llama", "llava_next": "mistral", "gemma3": "gemma3_text"}[kind]
    sizes = {"model_type": text, **SIZES, "num_key_value_heads": 2, "head_dim": 8}
    vision = TINY_VISION | {"model_type": "clip_vision_model" if kind.startswith("llava") else "siglip_vision_model"}
    whole_config = AutoConfig.for_model(kind, text_config=sizes, vision_config=vision)
    whole = AutoModelForImageTextToText.from_config(whole_config)
    whole.save_pretrained(tmp_path)
    if old_names:  # as llava-hf's folders have them
        tensors = load_file(tmp_path / "model.safetensors")
        again = {re.sub(r"^model\.language_model\.", "language_model.model.", name): t for name, t in tensors.items()}
        again = {re.sub(r"^lm_head\.", "language_model.lm_head.", name): tensor for name, tensor in again.items()}
        again = {re.sub(r"^model\.(vision|multi|image)", r"\1", name): tensor for name, tensor in again.items()}
        save_file(again, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = build_language_model(path=str(tmp_path), attention="sdpa")
    assert model.config.model_type == text
    pack_attention(model)
    ids = torch.arange(3, 14)[None]
    alone = whole.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model(input_ids=ids).logits, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../weights/model-1.safetensors", "must name files inside of it, found '../weights"),
        ("/etc/passwd", "must name files inside of it, found '/etc/passwd'"),
        ("link.safetensors", "must lie inside of its folder, found a link"),
        (7, "must name files inside of it, found 7"),
    ],
)
def test_an_index_names_files_of_its_folder_only(folder: Path, tmp_path: Path, name: Any, message: str) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "link.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(WeightsError, match=message):
        build_language_model(path=str(tmp_path))


def test_a_snapshot_of_hugging_faces_cache_is_made_of_links_and_read(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0a1b", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, blobs / f"{name}-blob")
        (snapshot / name).symlink_to(f"../../blobs/{name}-blob")
    build_language_model(path=str(snapshot))


def test_buffers_that_older_versions_wrote_are_left_out(folder: Path, tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    model = build_language_model(path=altered(folder, tmp_path, lambda tensors: tensors | old, {}))
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize("content", [b"", b"abc", None])
def test_a_damaged_file_is_one_line(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(
        WeightsError, match=r"the weights in .* can't be read: .*(Error while deserializing header|found an empty file)"
    ):
        build_language_model(path=str(tmp_path))


def test_a_shard_that_is_another_ones_copy_is_noticed(tmp_path: Path) -> None:
    """Transformers 4 believes the index, and leaves what isn't in the shard random without a word."""
    build_language_model(config=LLAMA).save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    names_of_first = sorted(load_file(first))
    shutil.copy(first, second)
    with pytest.raises(WeightsError, match=rf"holds tensors that another shard holds too: {names_of_first[0]}"):
        build_language_model(path=str(tmp_path))
    second.unlink()
    with pytest.raises(WeightsError, match=rf"names files that aren't there: {second.name}"):
        build_language_model(path=str(tmp_path))
