"""What the JSON files of a folder say: compared with the encoder, and named where it is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers

from composer_path.weights.tensor_file import WeightsError
from composer_path.weights.vision_file import build_vision_encoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
OURS: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
NAME = "timm/vit_base_patch16_224"
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ViT of transformers' with its preprocessor."""
    config = transformers.ViTConfig(**SIZES, intermediate_size=64)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HALF))
    return tmp_path


def build(folder: Path, name: str = NAME, **words: Any) -> Any:
    kwargs = {**OURS, "norm_eps": 1e-12} | words.pop("kwargs", {})
    return build_vision_encoder(name, image_size=32, kwargs=kwargs, weights=str(folder), **words)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_heads": 2}, r"num_heads 4, not 2 \(kwargs: {num_heads: 4}"),
        ({"act_layer": "quick_gelu"}, "activation gelu, not quick_gelu"),
        ({"act_layer": "torch.nn.SiLU"}, "activation gelu, not silu"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-12, not 1e-06"),
        ({"patch_size": 4}, "patch_size 8, not 4"),
        ({"depth": 2, "embed_dim": 64}, "dim 32, not 64 .*; depth 1, not 2"),
    ],
)
def test_what_no_shape_tells_is_compared_with_the_config(folder: Path, kwargs: dict, message: str) -> None:
    with pytest.raises(WeightsError, match=f"config.json' says another architecture than .*{message}"):
        build(folder, kwargs=kwargs)


def test_what_a_config_leaves_out_is_the_default_of_its_library(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "hidden_act"}))
    with pytest.raises(WeightsError, match="activation gelu, not quick_gelu"):
        build(folder, kwargs={"act_layer": "quick_gelu"})


@pytest.mark.parametrize(
    "said, mean, std",
    [
        ({"rescale_factor": 1 / 127.5}, 0.25, 0.25),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2),
    ],
)
def test_how_a_preprocessor_scales_pixels_is_part_of_its_normalisation(
    folder: Path, said: dict[str, Any], mean: float, std: float
) -> None:
    change(folder / "preprocessor_config.json", **said)
    message = rf"says mean \[{mean}, {mean}, {mean}\] \(here .*, std \[{std}, {std}, {std}\] \(here"
    with pytest.raises(WeightsError, match=message):
        build(folder)
    change(folder / "preprocessor_config.json", rescale_factor=0, do_rescale=True)
    with pytest.raises(WeightsError, match="rescale_factor: must be a number from 0 to 1; found 0"):
        build(folder)


def test_what_to_write_is_of_the_encoders_library(tmp_path: Path) -> None:
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, hidden_act="gelu")).save_pretrained(tmp_path)
    kwargs = {"width": 32, "layers": 2, "head_width": 8, "patch_size": 8}
    message = (
        r"depth 1, not 2 \(kwargs: {layers: 1}, or another name\); activation gelu, not quick_gelu \(another name\)"
    )
    with pytest.raises(WeightsError, match=message):
        build_vision_encoder("open_clip/ViT-B-32-quickgelu", image_size=32, kwargs=kwargs, weights=str(tmp_path))


def test_another_normalisation_is_refused_unless_the_user_gave_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert build(folder).mean == (0.5, 0.5, 0.5)  # timm's default for the name happens to be the folder's
    change(folder / "preprocessor_config.json", image_mean=[0.7, 0.6, 0.7])
    with pytest.raises(WeightsError, match=r"preprocessor_config.json' says mean \[0.7, 0.6, 0.7\] \(here \[0.5"):
        build(folder)
    assert build(folder, mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0]).mean == (0.1, 0.2, 0.3)
    assert "the YAML's are used" in caplog.text


def test_a_mean_that_is_only_the_librarys_default_earns_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "model.safetensors"
    build(folder)
    build(file, mean=[0.5] * 3, std=[0.5] * 3)
    build(file, name="phikon")
    assert "only the library's default" not in caplog.text
    build(file)
    assert "only the library's default for 'timm/vit_base_patch16_224'" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must be a JSON object"),
        ("[1]", "found a list"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": NaN}', "NaN, which is no number"),
        ('{"a":' * 100_000, "nested too deeply|must be a JSON object"),
        ("\udcff\udcfe", "must be a JSON object"),
        ('{"a": ' + "1" * 5000 + "}", "must be a JSON object"),
    ],
    ids=["empty", "list", "twice", "nan", "deep", "bytes", "digits"],
)
def test_a_file_that_is_no_plain_json_object_is_named(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(WeightsError, match=f"{name}': .*({message})"):
        build(folder)


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("config.json", {"num_attention_heads": "4"}, "num_attention_heads: must be a int; found '4'"),
        ("config.json", {"num_attention_heads": True}, "num_attention_heads: must be a int; found True"),
        ("config.json", {"hidden_act": "tanh"}, "hidden_act: must be one of gelu"),
        ("config.json", {"vision_config": [1]}, "vision_config: must be an object; found a list"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "mean: must be three numbers"),
        ("preprocessor_config.json", {"image_mean": "0.5"}, "mean: must be three numbers"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, "std: must be three numbers, of std above 0"),
        ("preprocessor_config.json", {"image_std": None}, "std: must be three numbers"),
    ],
)
def test_a_value_of_another_kind_is_named(folder: Path, name: str, values: dict, message: str) -> None:
    change(folder / name, **values)
    with pytest.raises(WeightsError, match=f"{name}': {message}"):
        build(folder)


def test_an_index_leads_nowhere_outside_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path.parent / "outside.safetensors")
    index = {"weight_map": {"norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"must name files inside of it, found '\.\./outside.safetensors'"):
        build(folder)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds none of model.safetensors"):
        build(tmp_path)


def test_timms_folder_is_compared_by_the_architecture_that_it_names(tmp_path: Path) -> None:
    words = {"embed_dim": 32, "depth": 1, "num_heads": 4, "patch_size": 8}
    model = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=0, **words)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    normalization = {"mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2]}
    config = {"architecture": "vit_base_patch16_224", "model_args": words, "pretrained_cfg": normalization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given: dict[str, Any] = {"image_size": 32, "weights": str(tmp_path), "mean": [0.7, 0.6, 0.7], "std": [0.2] * 3}
    assert build_vision_encoder(NAME, kwargs=words, **given).mean == (0.7, 0.6, 0.7)
    with pytest.raises(WeightsError, match="num_heads 4, not 2"):
        build_vision_encoder(NAME, kwargs={**words, "num_heads": 2}, **given)
    change(tmp_path / "config.json", architecture="vit_of_nobody")
    with pytest.raises(
        WeightsError, match=r"architecture and model_args: no ViT can be built of it; .*no model 'vit_of_nobody'"
    ):
        build_vision_encoder(NAME, kwargs=words, **given)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"checkpoint_path": "evil.pth"}, "checkpoint_path"),
        ({"pretrained_cfg": {"file": "evil.pth"}}, "pretrained_cfg"),
        ({"depth": 10**9}, "depth must be 1000 at most"),
        ({"embed_dim": 10**9}, "embed_dim must be 100000 at most"),
        ({"act_layer": "os.system"}, "a layer must be one of"),
        ({"embed_dim": "wide"}, "no ViT can be built"),
        ([], "model_args: must be an object"),
    ],
)
def test_arguments_of_timms_folder_can_neither_fetch_nor_take_for_ever(
    tmp_path: Path, arguments: Any, message: str
) -> None:
    torch.save({"patch_embed.proj.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    config = {"architecture": "vit_base_patch16_224", "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        build(tmp_path)


@pytest.mark.parametrize("quick", [True, False])
def test_open_clips_folder_says_whether_its_gelu_is_quick(tmp_path: Path, quick: bool) -> None:
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick}
    (tmp_path / "tiny-folder-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("tiny-folder-clip").eval()
    place = tmp_path / "folder"
    place.mkdir()
    torch.save(model.state_dict(), place / "open_clip_pytorch_model.bin")
    preprocess = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    kwargs = {"layers": 1, "width": 32, "head_width": 8, "patch_size": 8}
    names = {True: "open_clip/ViT-B-32-quickgelu", False: "open_clip/ViT-B-32"}
    encoder = build_vision_encoder(names[quick], image_size=32, kwargs=kwargs, weights=str(place)).eval()
    images = torch.randn(1, 3, 32, 32)
    ours, theirs = encoder(images)[:, 0] @ model.visual.proj, model.visual(images)
    assert float((ours - theirs).abs().max().detach()) < 1e-5
    with pytest.raises(WeightsError, match=r"activation (quick_)?gelu, not (quick_)?gelu"):
        build_vision_encoder(names[not quick], image_size=32, kwargs=kwargs, weights=str(place))


def test_a_config_of_another_kind_of_model_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (folder / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    with pytest.raises(WeightsError, match="model_type: must be a ViT that is read; found 'of_nobody'"):
        build(folder)
