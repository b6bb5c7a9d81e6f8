"""A whole folder in the reference's names: read, checked, and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer_path import PathMLLM, load_reference_model, save_reference_model
from composer_path.weights.language_folder import build_language_model
from composer_path.weights.projector_file import build_projector
from composer_path.weights.reference import from_reference, to_reference
from composer_path.weights.tensor_file import WeightsError
from composer_path.weights.vision_file import build_vision_encoder

SIZES: dict[str, Any] = {"image_size": 64, "patch_size": 16, "num_heads": 4}


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def tensors(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "model" / "model.safetensors")


@pytest.fixture
def config(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "model" / "config.json").read_text())


def test_the_golden_model_gives_the_references_features_and_projected_tokens(golden: Path) -> None:
    model = load_reference_model(golden / "model", **SIZES)
    expected = load_file(golden / "model" / "expected.safetensors")
    images = load_file(golden / "model" / "batch.safetensors")["images"]
    features = model.vision_encoder(images)
    assert relative_error(features, expected["vision_features"]) < 1e-5  # measured 6.6e-7
    assert relative_error(model.projector(features), expected["projected"]) < 1e-5  # measured 6.3e-7


def test_every_tensor_of_the_file_is_in_the_model_and_nothing_is_left_on_the_meta_device(
    golden: Path, tensors: dict[str, torch.Tensor]
) -> None:
    model = load_reference_model(golden / "model", **SIZES)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert all(parameter.requires_grad for parameter in model.parameters())
    back = to_reference(model.state_dict())
    learned = {key: value for key, value in tensors.items() if not key.endswith("inv_freq")}
    assert back.keys() == learned.keys()
    assert all(torch.equal(back[key], learned[key]) for key in learned)
    # The frequencies aren't read, but computed; they are the reference's.
    inv_freq = dict(model.language_model.named_buffers())["model.rotary_emb.inv_freq"]
    assert torch.equal(inv_freq, tensors["model.layers.0.self_attn.rotary_emb.inv_freq"])


def test_to_and_from_reference_are_inverse(golden: Path) -> None:
    state_dict = load_reference_model(golden / "model", **SIZES).state_dict()
    again = from_reference(to_reference(state_dict))
    assert again.keys() == state_dict.keys()
    assert all(again[key] is state_dict[key] for key in state_dict)


@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_a_written_folder_loads_to_the_same_model(golden: Path, tmp_path: Path, max_shard_size: str) -> None:
    model = load_reference_model(golden / "model", **SIZES)
    save_reference_model(model, tmp_path / "out", max_shard_size=max_shard_size)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (max_shard_size == "200KB")
    again = load_reference_model(tmp_path / "out", **SIZES)
    assert again.config() == model.config()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_the_written_config_has_the_references_keys(golden: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    save_reference_model(load_reference_model(golden / "model", **SIZES), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in config.items():
        if key == "model_type" or key == "use_mm_proj" or (key.startswith("mm_")):
            assert written[key] == value, key
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert written[key] == config[key], key


def test_the_written_config_names_rope_in_the_references_words(golden: Path, tmp_path: Path) -> None:
    """Also under transformers 5, whose own word for it the reference's older transformers would pass over."""
    model = load_reference_model(golden / "model", **SIZES)
    save_reference_model(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 10000.0 and written["rope_scaling"] is None
    assert "rope_parameters" not in written


@pytest.mark.parametrize("projector_type", ["attn_pool+linear", "linear", "mlp3x_gelu", "identity"])
@pytest.mark.parametrize("tied", [False, True])
def test_other_projectors_and_tied_embeddings_make_the_round_trip(
    tmp_path: Path, projector_type: str, tied: bool
) -> None:
    dim = 32
    language = {"model_type": "llama", "vocab_size": 64, "hidden_size": dim, "intermediate_size": 48}
    language |= {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    pooler = {"dim": 16, "num_queries": 3} if "attn_pool" in projector_type else None
    model = PathMLLM(
        build_vision_encoder("coca_vit-l", image_size=32, kwargs={"embed_dim": dim, "depth": 1, "num_heads": 4}),
        build_projector(in_dim=dim, out_dim=dim, type=projector_type, pooler=pooler),
        build_language_model(config=language),
    )
    save_reference_model(model, tmp_path / "out")
    keys = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("model.mm_projector.weight" in keys) == (projector_type == "linear")
    assert ("model.mm_projector.proj.weight" in keys) == (projector_type == "attn_pool+linear")
    assert ("lm_head.weight" in keys) != tied
    again = load_reference_model(tmp_path / "out", image_size=32, num_heads=4)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    weights = again.language_model
    assert (weights.lm_head.weight is weights.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_marks_around_images_are_the_last_two_words_of_the_references_embedding(tmp_path: Path, tied: bool) -> None:
    language: dict[str, Any] = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    language |= {"num_hidden_layers": 1, "num_attention_heads": 4, "tie_word_embeddings": tied}
    model = PathMLLM(
        build_vision_encoder("coca_vit-l", image_size=32, kwargs={"embed_dim": 32, "depth": 1, "num_heads": 4}),
        build_projector(in_dim=32, out_dim=32, type="linear", image_marks=True),
        build_language_model(config=language),
    )
    model.projector.marks.data.normal_()
    save_reference_model(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    words, ours = written["model.embed_tokens.weight"], model.state_dict()
    assert torch.equal(words[:64], ours["language_model.model.embed_tokens.weight"])
    assert torch.equal(words[64:], ours["projector.marks"]) and len(words) == 66
    if not tied:  # nothing learns to say them
        head = written["lm_head.weight"]
        assert torch.allclose(head[64:], head[:64].mean(0).expand(2, -1), atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mm_use_im_start_end"] is True and config["vocab_size"] == 66
    again = load_reference_model(tmp_path / "out", image_size=32, num_heads=4)
    assert torch.equal(again.projector.marks, model.projector.marks) and again.num_embeddings() == 66
    assert again.num_image_tokens() == model.num_image_tokens() == 4 + 1 + 2
    save_reference_model(again, tmp_path / "again", mark_id=64)  # where they are words already, they stay those
    for key, value in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.allclose(value, written[key], atol=1e-6), key


def test_pickled_shards_are_read(tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    keys = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": keys[::2], "pytorch_model-00002-of-00002.bin": keys[1::2]}
    for name, names in shards.items():
        torch.save({key: tensors[key].half() for key in names}, tmp_path / name)
    index = {"weight_map": {key: name for name, names in shards.items() for key in names}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_reference_model(tmp_path, **SIZES, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}  # inv_freq never loses bits
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightsError, match=r"aren\'t there: pytorch_model-00002-of-00002\.bin"):
        load_reference_model(tmp_path, **SIZES)


def test_every_missing_and_left_over_key_and_other_shape_is_listed(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    del tensors["model.norm.weight"], tensors["model.vision_tower.vision_tower.norm.bias"]
    tensors["model.extra"] = torch.zeros(1)
    tensors["model.mm_projector.extra"] = torch.zeros(1)
    tensors["model.mm_projector.ln.weight"] = torch.zeros(47)
    folder = write(tmp_path / "broken", tensors, config)
    with pytest.raises(WeightsError) as error:
        load_reference_model(folder, **SIZES)
    message = str(error.value)
    assert "missing (2): language_model.model.norm.weight, vision_encoder.trunk.norm.bias" in message
    assert "left over (2): language_model.model.extra, projector.extra" in message
    assert "projector.ln.weight: the file has [47], the model [48]" in message


@pytest.mark.parametrize(
    "changes, sizes, message",
    [
        ({}, {"image_size": 448}, "17 position embeddings .* make 785"),
        ({}, {"patch_size": 8}, "patches of 16 px"),
        ({}, {"num_heads": 5}, "num_heads 5 doesn't divide the ViT's width 64"),
        ({"model_type": "llama"}, {}, "found 'llama' and 'coca_vit-l'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, {}, "found 'llava' and 'openai/clip"),
        ({"mm_projector_type": "linear"}, {}, "type 'linear' has no pooler"),
        ({"mm_projector_type": "mlp2x"}, {}, "unknown type 'mlp2x'"),
    ],
)
def test_what_the_tensors_contradict_is_named(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    changes: dict[str, Any],
    sizes: dict[str, Any],
    message: str,
) -> None:
    folder = write(tmp_path / "model", tensors, config | changes)
    with pytest.raises(ValueError, match=message):
        load_reference_model(folder, **(SIZES | sizes))


def test_an_empty_folder_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_reference_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"holds none of model\.safetensors"):
        load_reference_model(tmp_path)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(WeightsError, match=r"must name files inside of it, found '\.\./a"):
        load_reference_model(tmp_path)


def test_what_the_reference_has_no_names_for_is_not_written(golden: Path, tmp_path: Path) -> None:
    model = load_reference_model(golden / "model", **SIZES)
    model.projector = build_projector(in_dim=64, out_dim=64, pooler={"kind": "open_clip", "dim": 48})
    with pytest.raises(WeightsError, match=r"no place for: pooler .*open_clip"):
        save_reference_model(model, tmp_path / "out")
