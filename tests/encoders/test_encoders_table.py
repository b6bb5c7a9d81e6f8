"""The table of public encoders: what it says is what is built, at full size on the meta device and tiny for real."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from composer_path.cli import main
from composer_path.encoders.table import ALIASES, ENCODERS, LEFT_OUT, encoder_meant
from composer_path.models.projector import untrained_projector
from composer_path.models.vision_encoder import check_vision_name, untrained_vision_encoder
from composer_path.weights.projector_origin import ProjectorOrigin, origin_of
from composer_path.weights.vision_file import build_vision_encoder

# Published counts of what makes tokens; a rounded one is met to its last digit.
PUBLISHED = {name: recipe.num_parameters for name, recipe in ENCODERS.items() if recipe.num_parameters}
TINY: dict[str, Any] = {"embed_dim": 48, "depth": 1, "num_heads": 2}
# Of a gated MLP's hidden width, which its recipe writes as a ratio: facebookresearch/dinov2, layers/swiglu_ffn.py
SWIGLU = {"hibou-b": 768, "hibou-l": 1024, "dinov2-giant": 1536}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_of_the_table_is_built_as_it_says(name: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe = ENCODERS[name]
    with torch.device("meta"):
        encoder = untrained_vision_encoder(name)
    size = recipe.image_size
    assert (encoder.image_size, encoder.patch_size) == (size, recipe.patch_size)
    assert encoder.num_prefix_tokens == recipe.num_prefix_tokens
    assert encoder.num_tokens(size, size) == recipe.num_tokens
    assert (encoder.mean, encoder.std) == recipe.normalization
    assert encoder.normalization_known and recipe.sources and not caplog.records
    if name in SWIGLU:
        dim = SWIGLU[name]
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        assert encoder.blocks[0].mlp.fc1.weight.shape == (2 * hidden, dim)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        encoder = untrained_vision_encoder(name)
    ours, published = sum(value.numel() for value in encoder.parameters()), PUBLISHED[name]
    assert published is not None
    unit = 10 ** (len(str(published)) - len(str(published).rstrip("0")) - 1) if published % 10 == 0 else 1
    assert abs(ours - published) <= max(unit, published % 10 == 0 and 10**6), (ours, published)


@pytest.mark.parametrize("name", ["uni2-h", "virchow2", "gigapath", "h-optimus-0", "conch", "biomedclip"])
def test_a_tiny_twin_of_timms_gives_the_features_of_timm(name: str, tmp_path: Path) -> None:
    recipe = ENCODERS[name]
    words = {**recipe.kwargs, **TINY}
    for key, layer in (("mlp_layer", timm.layers.SwiGLUPacked), ("act_layer", torch.nn.SiLU)):
        words |= {key: layer} if key in words else {}
    side = 4 * recipe.patch_size
    model = timm.create_model(recipe.base.removeprefix("timm/"), img_size=side, num_classes=0, **words).eval()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    encoder = build_vision_encoder(
        name, image_size=side, kwargs=TINY, weights=str(tmp_path / "pytorch_model.bin")
    ).eval()
    again = untrained_vision_encoder(**json.loads(json.dumps(encoder.config)))  # as an exported model is rebuilt
    assert again.config == encoder.config and again.facts() == encoder.facts()
    images = torch.randn(1, 3, side, side)
    ours, theirs = encoder(images), model.forward_features(images)
    assert float(((ours - theirs).abs().max() / theirs.abs().max()).detach()) < 1e-5  # measured 0


def test_what_the_yaml_says_beside_a_name_wins_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        encoder = untrained_vision_encoder(
            "uni", image_size=448, mean=[0.5, 0.5, 0.5], kwargs={"depth": 2, "init_values": 1.0}
        )
    assert (encoder.image_size, encoder.mean, len(encoder.blocks)) == (448, (0.5, 0.5, 0.5), 2)
    assert "init_values 1.0 (its own: 1e-05)" in caplog.text
    assert "mean: (0.5, 0.5, 0.5), where 'uni' was made with (0.485" in caplog.text


@pytest.mark.parametrize(
    "key, value",
    [("act_layer", "torch.nn.SiLU"), ("act_layer", "silu"), ("mlp_layer", "timm.layers.SwiGLUPacked")],
)
def test_layers_are_taken_as_cards_write_them(key: str, value: str) -> None:
    kwargs = {**TINY, "mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", key: value}
    encoder = untrained_vision_encoder("timm/vit_huge_patch14_224", image_size=28, kwargs=kwargs)
    assert isinstance(encoder.blocks[0].mlp.act, torch.nn.SiLU)
    assert encoder.config["kwargs"][key] == value.rpartition(".")[2]


@pytest.mark.parametrize(
    "value", ["torch.nn.functional", "os.system", "torch.nn.Silu", "SiLUU", "functional", "torch.load"]
)
def test_a_layer_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"act_layer|a layer must be one of timm.layers or torch.nn"):
        untrained_vision_encoder("timm/vit_huge_patch14_224", image_size=28, kwargs={**TINY, "act_layer": value})


@pytest.mark.parametrize(
    "name, meant",
    [
        ("openai/clip-vit-large-patch14-336", "open_clip/ViT-L-14-336-quickgelu"),
        ("openai/clip-vit-base-patch32", "open_clip/ViT-B-32-quickgelu"),
        ("MahmoodLab/UNI2-h", "uni2-h"),
        ("MahmoodLab/conchv1_5", "conch-v1.5"),
        ("paige-ai/Virchow2", "virchow2"),
        ("prov-gigapath/prov-gigapath", "gigapath"),
        ("histai/hibou-L", "hibou-l"),
        ("bioptimus/H-optimus-1", "h-optimus-1"),
        ("google/medsiglip-448", "medsiglip"),
        ("google/siglip2-so400m-patch14-384", "siglip2-so400m-patch14-378"),
        ("facebook/dinov2-with-registers-base", "dinov2-base-reg"),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", "dinov3-large"),
        ("uni2h", "uni2-h"),
        ("virchov2", "virchow2"),
        ("resnet50", None),
    ],
)
def test_names_of_hubs_get_a_hint(name: str, meant: str | None) -> None:
    assert encoder_meant(name) == meant
    with pytest.raises(ValueError, match=f"did you mean {meant}" if meant else "lists, timm/<a timm ViT> or [^;]*$"):
        check_vision_name(name)


def test_aliases_lead_to_what_there_is() -> None:
    for meant in ALIASES.values():
        if meant not in LEFT_OUT:
            check_vision_name(meant)
    for name, why in LEFT_OUT.items():
        with pytest.raises(ValueError, match="is not in the table of encoders"):
            check_vision_name(name)
        assert why and name not in ENCODERS


def test_a_projectors_file_says_which_encoder_it_was_trained_with() -> None:
    encoder = untrained_vision_encoder("uni2-h", image_size=56, kwargs=TINY)
    projector = untrained_projector(type="linear", in_dim=48, out_dim=16)
    stored = ProjectorOrigin.from_json(origin_of(projector, encoder).to_json())
    assert stored.encoder["name"] == "uni2-h" and not stored.differences(projector, encoder)
    other = untrained_vision_encoder("virchow2", image_size=56, kwargs=TINY)
    assert "vision_encoder.name: the file has uni2-h, the model virchow2" in stored.differences(projector, other)


def test_the_command_lists_all_of_them_and_tells_the_sources_of_one(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert main(["encoders"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()][1 : len(ENCODERS) + 1] == list(ENCODERS)
    assert main(["encoders", "virchow2"]) == 0
    told = capsys.readouterr().out
    assert all(source in told for source in ENCODERS["virchow2"].sources) and "'reg_tokens': 4" in told
    assert main(["encoders", "virchow3"]) == 2
    assert "there is no encoder 'virchow3'" in capsys.readouterr().err
