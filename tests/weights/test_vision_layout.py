"""Files as each library writes them, read by us, against that library's own forward pass at two image sizes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import eva, vision_transformer
from tiny_towers import OURS, SIZES, error, images, last, shaken, transformers_model
from torch import nn

from composer_path.models.vision_encoder import VisionEncoder
from composer_path.weights.tensor_file import WeightsError
from composer_path.weights.vision_file import build_vision_encoder, load_vision_weights

VIT = {**SIZES, "intermediate_size": 64, "image_size": 56, "patch_size": 14}
DINO = {**SIZES, "mlp_ratio": 2, "image_size": 56, "patch_size": 14}
GATED = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", "mlp_ratio": 3}  # 96 of 32: a gate and what it opens
TOLERANCE = 1e-5  # measured 0 on a CPU


FOLDERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViT", VIT, "timm/vit_base_patch16_224", {"patch_size": 14, "mlp_ratio": 2, "norm_eps": 1e-12}),
    "dinov2": ("Dinov2", DINO, "timm/vit_base_patch14_dinov2", {"mlp_ratio": 2}),
    "dinov2 with registers": ("Dinov2WithRegisters", DINO, "timm/vit_base_patch14_reg4_dinov2", {"mlp_ratio": 2}),
    "registers with positions": (
        "Dinov2WithRegisters",
        DINO,
        "timm/vit_base_patch14_dinov2",
        {"mlp_ratio": 2, "reg_tokens": 4},
    ),
    "gated dinov2": (
        "Dinov2WithRegisters",
        {**DINO, "use_swiglu_ffn": True},
        "timm/vit_base_patch14_reg4_dinov2",
        GATED,
    ),
    "dinov3": (
        "DINOv3ViT",
        {**VIT, "num_register_tokens": 4},
        "timm/vit_base_patch16_dinov3_qkvb",
        {"patch_size": 14, "mlp_ratio": 2},
    ),
    "gated dinov3": (
        "DINOv3ViT",
        {**VIT, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        "timm/vit_small_plus_patch16_dinov3_qkvb",
        {"patch_size": 14, "mlp_ratio": 2},
    ),
    "clip": (
        "CLIPVision",
        VIT,
        "open_clip/ViT-B-32-quickgelu",
        {"width": 32, "layers": 2, "head_width": 8, "patch_size": 14, "mlp_ratio": 2.0},
    ),
    "clip in timm": (
        "CLIPVision",
        {**VIT, "hidden_act": "gelu"},
        "timm/vit_base_patch32_clip_224",
        {"patch_size": 14, "mlp_ratio": 2},
    ),
    "siglip": ("SiglipVision", VIT, "siglip2-base-patch16-224", {"patch_size": 14, "mlp_ratio": 2}),
}


@pytest.mark.parametrize("size", [56, 112])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_transformers_gives_its_own_tokens(tmp_path: Path, kind: str, size: int) -> None:
    family, config, name, kwargs = FOLDERS[kind]
    model = transformers_model(family, **config)
    model.save_pretrained(tmp_path)
    kwargs = kwargs if name.startswith("open_clip/") else {**OURS, **kwargs}
    encoder = build_vision_encoder(name, image_size=size, kwargs=kwargs, weights=str(tmp_path)).eval()
    assert error(encoder(images(size)), last(model, size)) < TOLERANCE


@pytest.mark.parametrize("kind", ["vit", "gated dinov2", "dinov3", "clip"])
def test_what_torch_saves_of_a_model_of_transformers_is_read_too(tmp_path: Path, kind: str) -> None:
    family, config, name, kwargs = FOLDERS[kind]
    model = transformers_model(family, **config)
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    kwargs = kwargs if name.startswith("open_clip/") else {**OURS, **kwargs}
    encoder = build_vision_encoder(name, image_size=56, kwargs=kwargs, weights=str(tmp_path / "memory.pth")).eval()
    assert error(encoder(images(56)), last(model, 56)) < TOLERANCE


def test_the_vision_half_of_a_whole_clip_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = {**SIZES, "intermediate_size": 64, "vocab_size": 40, "max_position_embeddings": 8}
    model = transformers_model("CLIP", vision_config=VIT, text_config=text)
    model.save_pretrained(tmp_path)
    kwargs = {"width": 32, "layers": 2, "head_width": 8, "patch_size": 14, "mlp_ratio": 2.0}
    with caplog.at_level(logging.INFO):
        encoder = build_vision_encoder(
            "open_clip/ViT-B-32-quickgelu", image_size=56, kwargs=kwargs, weights=str(tmp_path)
        )
    vision = model.vision_model
    theirs = vision.post_layernorm(vision(images(56)).last_hidden_state)
    assert error(encoder.eval()(images(56)), theirs) < TOLERANCE
    assert "tensors were left out: logit_scale, text_model" in caplog.text


def as_written(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of transformers', whose names since version 5 aren't those in memory."""
    model.save_pretrained(folder / "written")
    return load_file(folder / "written" / "model.safetensors")


def as_dinov2_writes_it(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of transformers' Dinov2 by the names of the DINOv2 repository."""
    tensors = {}
    state = as_written(model, folder)
    for key in state:
        new = key.replace("embeddings.patch_embeddings.projection", "patch_embed.proj").replace("embeddings.", "")
        new = new.replace("position_embeddings", "pos_embed").replace("encoder.layer.", "blocks.")
        new = new.replace("layer_scale1.lambda1", "ls1.gamma").replace("layer_scale2.lambda1", "ls2.gamma")
        new = new.replace("weights_in", "w12").replace("weights_out", "w3").replace("layernorm", "norm")
        new = new.replace("attention.output.dense", "attn.proj")
        if ".attention.attention.query." in key:
            three = [state[key.replace("query", part)] for part in ("query", "key", "value")]
            tensors[new.replace("attention.attention.query", "attn.qkv")] = torch.cat(three)
        elif ".attention.attention." not in key:
            tensors[new] = state[key]
    return tensors


def chunked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Blocks in chunks of one, as a run under FSDP saves them: block 1 is the second of chunk 1."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", key): value for key, value in tensors.items()}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        chunked,
        lambda tensors: {f"backbone.{key}": value for key, value in tensors.items()},
        lambda tensors: {
            **{f"teacher.backbone.{key}": value for key, value in tensors.items()},
            **{f"student.backbone.{key}": value + 1 for key, value in tensors.items()},
            "teacher.dino_head.last_layer.weight_g": torch.zeros(3),
        },
        lambda tensors: {"teacher": {f"backbone.{key}": value for key, value in tensors.items()}},
    ],
    ids=["plain", "chunked", "backbone", "teacher and student", "in a dict"],
)
def test_a_file_of_the_dinov2_repository_gives_its_tokens(tmp_path: Path, registers: int, wrap: Callable) -> None:
    config = {**DINO, "use_swiglu_ffn": True}
    words = {"num_register_tokens": 4} if registers else {}
    model = transformers_model("Dinov2WithRegisters" if registers else "Dinov2", **config, **words)
    torch.save(wrap(as_dinov2_writes_it(model, tmp_path)), tmp_path / "dinov2.pth")
    name = f"timm/vit_base_patch14_{'reg4_' if registers else ''}dinov2"
    encoder = build_vision_encoder(name, image_size=56, kwargs={**OURS, **GATED}, weights=str(tmp_path / "dinov2.pth"))
    assert error(encoder.eval()(images(56)), last(model, 56)) < TOLERANCE


def test_dinov2_without_registers_is_resampled_with_its_offset(tmp_path: Path) -> None:
    model = transformers_model("Dinov2", **DINO)
    tensors = as_dinov2_writes_it(model, tmp_path)
    torch.save(tensors, tmp_path / "dinov2.pth")
    name, kwargs = "timm/vit_base_patch14_dinov2", {**OURS, "mlp_ratio": 2}
    encoder = build_vision_encoder(name, image_size=112, kwargs=kwargs, weights=str(tmp_path / "dinov2.pth"))
    square = tensors["pos_embed"][:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    scale = (8 + 0.1) / 4  # what the DINOv2 repository hands to interpolate, not the new size
    expected = nn.functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    ours = encoder.trunk.pos_embed[:, 1:].reshape(1, 8, 8, 32).permute(0, 3, 1, 2)
    assert torch.equal(ours, expected)
    assert error(ours, nn.functional.interpolate(square, size=(8, 8), mode="bicubic")) > 1e-3  # it matters


TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", {"patch_size": 14}),
    "averaging": ("vit_base_patch16_siglip_gap_224", {"patch_size": 14}),
    "pooling by attention": ("vit_base_patch16_siglip_224", {"patch_size": 14}),
    "eva-02": ("eva02_tiny_patch14_224", {}),
    "eva-02 of clip": ("eva02_base_patch16_clip_224", {"patch_size": 14}),
    "dinov3": ("vit_small_patch16_dinov3", {"patch_size": 14}),
    "beit-3": ("beit3_base_patch16_224", {"patch_size": 14}),
}


@pytest.mark.parametrize("size", [56, 112])
@pytest.mark.parametrize("kind", TIMM)
def test_a_file_of_timm_gives_the_features_of_timm(tmp_path: Path, kind: str, size: int) -> None:
    name, words = TIMM[kind]
    model = shaken(timm.create_model(name, img_size=56, **OURS, **words))
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    again = timm.create_model(name, img_size=size, **OURS, **words)
    library = eva if isinstance(again, eva.Eva) else vision_transformer
    again.load_state_dict(library.checkpoint_filter_fn(dict(model.state_dict()), again))
    encoder = build_vision_encoder(
        f"timm/{name}", image_size=size, kwargs={**OURS, **words}, weights=str(tmp_path / "timm.pth")
    )
    assert error(encoder.eval()(images(size)), again.eval().forward_features(images(size))) < TOLERANCE


def test_a_file_of_the_eva_repository_gives_the_features_of_timm(tmp_path: Path) -> None:
    model = shaken(timm.create_model("eva02_base_patch14_224", img_size=56, **OURS))
    names = {"attn.norm.": "attn.inner_attn_ln.", "mlp.norm.": "mlp.ffn_ln."}
    names |= {"mlp.fc1_g.": "mlp.w1.", "mlp.fc1_x.": "mlp.w2.", "mlp.fc2.": "mlp.w3."}
    names |= {"attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias"}
    tensors = {"rope.freqs_cos": torch.zeros(16, 8), "mask_token": torch.zeros(1, 1, 32)}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        tensors[key.replace("fc_norm.", "norm.")] = value
    torch.save(tensors, tmp_path / "eva.pt")
    encoder = build_vision_encoder(
        "timm/eva02_base_patch14_224", image_size=56, kwargs=OURS, weights=str(tmp_path / "eva.pt")
    )
    assert error(encoder.eval()(images(56)), model.forward_features(images(56))) < TOLERANCE


@pytest.mark.parametrize("biases", [0.0, 1.0])
def test_biases_that_are_zero_may_be_there_or_not(tmp_path: Path, biases: float) -> None:
    model = shaken(timm.create_model("vit_small_patch16_dinov3_qkvb", img_size=32, **OURS))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q_bias.fill_(biases)
            block.attn.v_bias.fill_(biases)
    torch.save(model.state_dict(), tmp_path / "biases.pth")

    def build(name: str, file: str) -> VisionEncoder:
        return build_vision_encoder(f"timm/{name}", image_size=32, kwargs=OURS, weights=str(tmp_path / file)).eval()

    if biases:
        with pytest.raises(WeightsError, match=r"left over \(4\): blocks.0.attn.q_bias"):
            build("vit_small_patch16_dinov3", "biases.pth")
        return
    encoder = build("vit_small_patch16_dinov3", "biases.pth")
    assert error(encoder(images(32)), model.forward_features(images(32))) < TOLERANCE
    torch.save(encoder.trunk.state_dict(), tmp_path / "none.pth")
    assert error(build("vit_small_patch16_dinov3_qkvb", "none.pth")(images(32)), encoder(images(32))) < TOLERANCE


def test_a_file_of_open_clip_fits_timms_model_of_the_same_tower(tmp_path: Path) -> None:
    vision = {"image_size": 56, "layers": 2, "width": 32, "head_width": 8, "patch_size": 14}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-layout-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model = shaken(open_clip.create_model("tiny-layout-clip"))
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    tokens = []
    for name, kwargs in (
        ("timm/vit_base_patch32_clip_224", {**OURS, "patch_size": 14}),
        ("open_clip/tiny-layout-clip", {}),
    ):
        encoder = build_vision_encoder(name, image_size=56, kwargs=kwargs, weights=str(tmp_path / "clip.pt")).eval()
        tokens.append(encoder(images(56)))
    assert error(tokens[1][:, 0] @ model.visual.proj, model.visual(images(56))) < TOLERANCE
    assert error(tokens[0], tokens[1]) < TOLERANCE


def test_conchs_poolers_are_left_out_and_its_positions_resampled_bilinearly(tmp_path: Path) -> None:
    source = shaken(timm.create_model("vit_base_patch16_224", img_size=64, num_classes=0, **OURS))
    tensors = {f"visual.trunk.{key}": value for key, value in source.state_dict().items()}
    tensors |= {"visual.attn_pool_contrast.query": torch.zeros(1, 8), "text.cls_emb": torch.zeros(8)}
    torch.save(tensors, tmp_path / "conch.bin")
    encoder = build_vision_encoder("conch", image_size=128, kwargs=OURS, weights=str(tmp_path / "conch.bin"))
    square = source.pos_embed[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(square, size=(8, 8), mode="bilinear").permute(0, 2, 3, 1).reshape(1, 64, 32)
    assert torch.equal(encoder.trunk.pos_embed[:, 1:], expected)


def test_conch_v1_5_is_brought_to_224_px_before_it_is_resampled_with_an_offset(tmp_path: Path) -> None:
    source = shaken(timm.create_model("vit_large_patch16_224", img_size=448, num_classes=0, init_values=1.0, **OURS))
    tensors = {f"trunk.{key}": value for key, value in source.state_dict().items()}
    tensors |= {"attn_pool_contrast.query": torch.zeros(1, 8), "ln_contrast.weight": torch.zeros(8)}
    torch.save(tensors, tmp_path / "pytorch_model_vision.bin")
    encoder = build_vision_encoder("conch-v1.5", kwargs=OURS, weights=str(tmp_path))
    square = source.pos_embed[:, 1:].reshape(1, 28, 28, 32).permute(0, 3, 1, 2)
    square = nn.functional.interpolate(square, size=(14, 14), mode="bilinear")
    square = nn.functional.interpolate(square, scale_factor=(28.1 / 14, 28.1 / 14), mode="bicubic")
    assert torch.equal(encoder.trunk.pos_embed[:, 1:], square.permute(0, 2, 3, 1).reshape(1, 784, 32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder.layer.1.attention.attention.key.weight": None}, r"missing \(1\): blocks.1.attn.qkv.weight"),
        ({"encoder.layer.2.norm1.weight": 32}, r"left over \(1\): blocks.2.norm1.weight"),
        ({"encoder.layer.1.attention.attention.key.weight": (31, 32)}, r"other shapes \(1\): blocks.1.attn.qkv"),
        ({"embeddings.position_embeddings": (1, 18, 32)}, "isn't a square of patches"),
        ({"embeddings.position_embeddings": 32}, "isn't a square of patches"),
        ({"embeddings.cls_token": None}, r"missing \(1\): cls_token"),
        ({"something.else": 3}, r"left over \(1\): something.else"),
        ({"encoder.layer.0.mlp.fc1.weight": float("nan")}, "NaN or infinity"),
    ],
)
def test_what_is_missing_or_left_over_of_another_layout_is_listed(tmp_path: Path, change: dict, message: str) -> None:
    model = transformers_model("Dinov2", **DINO)
    tensors = as_written(model, tmp_path)
    for key, shape in change.items():
        if shape is None:
            del tensors[key]
        elif isinstance(shape, float):
            tensors[key] = torch.full_like(tensors[key], shape)
        else:
            tensors[key] = torch.zeros(shape)
    torch.save(tensors, tmp_path / "vision.pth")
    encoder = build_vision_encoder("timm/vit_base_patch14_dinov2", image_size=56, kwargs={**OURS, "mlp_ratio": 2})
    with pytest.raises(WeightsError, match=message):
        load_vision_weights(tmp_path / "vision.pth", encoder)


@pytest.mark.parametrize("kind", ["vit", "gated dinov2", "registers with positions", "dinov3", "clip", "siglip"])
def test_a_tensor_of_a_shape_that_no_vit_has_is_always_named(tmp_path: Path, kind: str) -> None:
    family, config, name, kwargs = FOLDERS[kind]
    tensors = as_written(transformers_model(family, **config), tmp_path)
    kwargs = kwargs if name.startswith("open_clip/") else {**OURS, **kwargs}
    encoder = build_vision_encoder(name, image_size=56, kwargs=kwargs)
    changed = 0
    for key in tensors:
        for shape in [(), (3,), (2, 2, 2, 2), (0,)]:
            torch.save({**tensors, key: torch.zeros(shape)}, tmp_path / "vision.pth")
            if re.match(r"(vision_model\.)?(pooler|head|embeddings\.mask_token)", key):  # left out, whatever it is
                load_vision_weights(tmp_path / "vision.pth", encoder)
                continue
            with pytest.raises(WeightsError):
                load_vision_weights(tmp_path / "vision.pth", encoder)
            changed += 1
    assert changed > 80


def test_two_tensors_that_are_the_same_of_the_model_are_named(tmp_path: Path) -> None:
    tensors = as_dinov2_writes_it(transformers_model("Dinov2", **DINO), tmp_path)
    tensors["blocks.0.1.norm1.weight"] = tensors["blocks.1.norm1.weight"] + 1
    torch.save(tensors, tmp_path / "vision.pth")
    encoder = build_vision_encoder("timm/vit_base_patch14_dinov2", image_size=56, kwargs={**OURS, "mlp_ratio": 2})
    with pytest.raises(WeightsError, match=r"both the model's 'blocks\.1\.norm1\.weight'; keep one"):
        load_vision_weights(tmp_path / "vision.pth", encoder)


def test_a_gated_mlp_is_one_of_silu(tmp_path: Path) -> None:
    model = transformers_model("Dinov2", **DINO, use_swiglu_ffn=True)
    torch.save(as_dinov2_writes_it(model, tmp_path), tmp_path / "vision.pth")
    kwargs = {**OURS, **GATED, "act_layer": "GELU"}
    with pytest.raises(WeightsError, match=r"has a gated MLP of SiLU \('blocks\.0\.mlp\.w12.*the model has gelu"):
        build_vision_encoder(
            "timm/vit_base_patch14_dinov2", image_size=56, kwargs=kwargs, weights=str(tmp_path / "vision.pth")
        )
