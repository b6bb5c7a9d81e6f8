"""The vision encoder against the reference's features, and the kinds of ViT that pathology uses, tiny."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file

from composer_path.images.pixels import IMAGE_MEAN, IMAGE_STD
from composer_path.models.open_clip_trunk import OpenClipTrunk
from composer_path.models.parameters import cast_parameters
from composer_path.models.vision_encoder import VisionEncoder, untrained_vision_encoder
from composer_path.weights.vision_file import load_vision_weights

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4}
# The keywords that the model cards of these encoders give for timm, but tiny.
UNI2_H = {
    "patch_size": 14,
    "init_values": 1e-5,
    "mlp_ratio": 2.66667 * 2,
    "no_embed_class": True,
    "mlp_layer": "SwiGLUPacked",
    "act_layer": "SiLU",
    "reg_tokens": 8,
    "dynamic_img_size": True,
    **TINY,
}
VIRCHOW = {"init_values": 1e-5, "mlp_ratio": 5.3375, "mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", **TINY}


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.fixture
def clip_names(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Three tiny open_clip models: CLIP, CoCa, and one whose tower is timm's."""
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    timm_vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none", "image_size": 32}
    configs = {
        "tiny-clip": {"embed_dim": 16, "vision_cfg": {**vision, "patch_dropout": 0.5}, "text_cfg": text},
        "tiny-coca": {
            "embed_dim": 16,
            "vision_cfg": {**vision, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
            "text_cfg": text,
        },
        "tiny-timm": {"embed_dim": 16, "vision_cfg": timm_vision, "text_cfg": text},
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    yield {name.removeprefix("tiny-"): f"open_clip/{name}" for name in configs}


def test_features_equal_the_references(golden: Path) -> None:
    expected = load_file(golden / "model" / "expected.safetensors")["vision_features"]
    images = load_file(golden / "model" / "batch.safetensors")["images"]
    prefix = "model.vision_tower.vision_tower."
    weights = load_file(golden / "model" / "model.safetensors")
    encoder = untrained_vision_encoder(
        "coca_vit-l", image_size=64, kwargs={"embed_dim": 64, "depth": 3, "num_heads": 4}
    )
    encoder.trunk.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    features = encoder.eval()(images)
    assert features.shape == (4, encoder.num_tokens(64, 64), encoder.dim) == (4, 17, 64)
    assert relative_error(features, expected) < 1e-5  # measured 6.6e-7


def test_coca_vit_l_is_the_references_architecture() -> None:
    with torch.device("meta"):
        encoder = untrained_vision_encoder("coca_vit-l")
    assert (encoder.image_size, encoder.patch_size, encoder.dim, len(encoder.blocks)) == (448, 16, 1024, 24)
    assert encoder.num_tokens(448, 448) == 785
    assert (encoder.mean, encoder.std) == (tuple(IMAGE_MEAN), tuple(IMAGE_STD))
    shapes = {key: tuple(value.shape) for key, value in encoder.trunk.state_dict().items()}
    assert shapes["pos_embed"] == (1, 785, 1024)
    assert shapes["blocks.0.ls1.gamma"] == (1024,)
    assert not any(key.startswith(("head", "fc_norm")) for key in shapes)


@pytest.mark.parametrize("tokens, kept", [("all", 1 + 8 + 16), ("cls_patches", 1 + 16), ("patches", 16)])
def test_uni2_h_gives_the_tokens_that_are_wanted(tokens: str, kept: int) -> None:
    encoder = untrained_vision_encoder("timm/vit_giant_patch14_224", image_size=56, tokens=tokens, kwargs=UNI2_H).eval()
    images = torch.randn(2, 3, 56, 56)
    features = encoder(images)
    assert features.shape == (2, kept, 32)
    assert encoder.num_tokens(56, 56) == kept
    everything = encoder.trunk.forward_features(images)
    expected = {
        "all": everything,
        "cls_patches": torch.cat([everything[:, :1], everything[:, 9:]], dim=1),
        "patches": everything[:, 9:],
    }[tokens]
    assert torch.equal(features, expected)
    assert isinstance(encoder.trunk.blocks[0].mlp, timm.layers.GluMlp)
    assert isinstance(encoder.trunk.blocks[0].mlp.act, torch.nn.SiLU)


def test_a_dynamic_size_counts_its_tokens_from_the_image() -> None:
    encoder = untrained_vision_encoder("timm/vit_giant_patch14_224", image_size=56, kwargs=UNI2_H).eval()
    assert encoder(torch.randn(1, 3, 28, 84)).shape[1] == encoder.num_tokens(28, 84) == 1 + 8 + 12
    with pytest.raises(ValueError, match="multiples of its patch size 14, found 30x56"):
        encoder.num_tokens(30, 56)


@pytest.mark.parametrize(
    "name, kwargs, prefix_tokens",
    [
        ("timm/vit_huge_patch14_224", VIRCHOW, 1),
        ("timm/vit_huge_patch14_224", {**VIRCHOW, "reg_tokens": 4}, 5),  # Virchow2
        ("timm/vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5, **TINY}, 5),  # H-optimus
        ("timm/vit_large_patch16_224", {"init_values": 1e-5, "patch_size": 14, **TINY}, 1),  # UNI's keywords
    ],
)
def test_pathology_encoders_of_timm_run(name: str, kwargs: dict, prefix_tokens: int) -> None:
    encoder = untrained_vision_encoder(name, image_size=28, kwargs=kwargs, mean=IMAGE_MEAN, std=IMAGE_STD)
    assert encoder(torch.randn(1, 3, 28, 28)).shape == (1, prefix_tokens + 4, 32)


OPERANDS = {
    "EVA-02, fused": "eva02_enormous_patch14_clip_224",
    "EVA-02": "eva02_tiny_patch14_224",
    "rotary": "vit_medium_patch16_rope_reg1_gap_256",
    "rotary, learned": "vit_small_patch16_rope_mixed_224",
    "DINOv3": "vit_small_patch16_dinov3_qkvb",
    "BEiT": "beit_base_patch16_224",
    "relative": "vit_relpos_small_patch16_224",
}


@pytest.mark.parametrize("kind", OPERANDS)
def test_weights_in_bf16_compute_without_autocast_what_those_in_fp32_do(kind: str) -> None:
    torch.manual_seed(3)
    patch = 14 if "14" in OPERANDS[kind] else 16
    encoder = untrained_vision_encoder(f"timm/{OPERANDS[kind]}", image_size=4 * patch, kwargs=TINY).eval()
    images = torch.randn(2, 3, 4 * patch, 4 * patch)
    with torch.no_grad():
        exact = encoder(images)
        in_bf16 = cast_parameters(encoder, torch.bfloat16)(images)
        again = cast_parameters(encoder, torch.float32)(images)
    assert in_bf16.dtype == torch.bfloat16 and again.dtype == torch.float32
    assert (in_bf16 - exact).norm() / exact.norm() < 0.02  # measured 0.003 to 0.007


def test_what_timm_states_for_a_name_is_used() -> None:
    encoder = untrained_vision_encoder("timm/vit_tiny_patch16_384", kwargs={"depth": 1})
    config = timm.get_pretrained_cfg("vit_tiny_patch16_384")
    assert encoder.image_size == 384
    assert (encoder.mean, encoder.std) == (config.mean, config.std)


@pytest.mark.parametrize("name", ["clip", "coca", "timm"])
def test_open_clip_tokens_have_the_towers_size(clip_names: dict[str, str], name: str) -> None:
    encoder = untrained_vision_encoder(clip_names[name])
    features = encoder.train()(torch.randn(2, 3, 32, 32))  # training, to show that no patch is dropped
    assert features.shape == (2, encoder.num_tokens(32, 32), encoder.dim)
    assert encoder.mean == open_clip.OPENAI_DATASET_MEAN
    assert len(encoder.blocks) == (12 if name == "timm" else 2)


def test_clip_tokens_are_those_that_open_clip_picks_its_embedding_from(clip_names: dict[str, str]) -> None:
    model = open_clip.create_model("tiny-clip").eval()
    encoder = untrained_vision_encoder(clip_names["clip"]).eval()
    load_state(encoder, model)
    images = torch.randn(2, 3, 32, 32)
    assert relative_error(encoder(images)[:, 0] @ model.visual.proj, model.visual(images)) < 1e-5  # measured 0


def test_coca_tokens_are_those_that_open_clip_pools(clip_names: dict[str, str]) -> None:
    tower = open_clip.create_model("tiny-coca").visual.eval()
    encoder = untrained_vision_encoder(clip_names["coca"]).eval()
    load_state(encoder, open_clip.create_model("tiny-coca"), tower)
    images = torch.randn(2, 3, 32, 32)
    seen = []
    tower.attn_pool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tower(images)
    assert relative_error(encoder(images), seen[0]) < 1e-5  # measured 0


def load_state(encoder: VisionEncoder, model: torch.nn.Module, tower: torch.nn.Module | None = None) -> None:
    assert isinstance(encoder.trunk, OpenClipTrunk)
    source = (tower or model.visual).state_dict()
    expected = encoder.trunk.tower.state_dict()
    encoder.trunk.tower.load_state_dict({key: source[key] for key in expected})


@pytest.mark.parametrize("name", ["timm/vit_giant_patch14_224", "clip", "coca", "timm"])
def test_the_config_rebuilds_the_architecture(clip_names: dict[str, str], name: str) -> None:
    if name in clip_names:
        encoder = untrained_vision_encoder(clip_names[name], tokens="patches", image_size=64)
    else:
        encoder = untrained_vision_encoder(
            name, image_size=56, kwargs=UNI2_H, tokens="cls_patches", mean=[0.1, 0.2, 0.3]
        )
    config = json.loads(json.dumps(encoder.config))
    again = untrained_vision_encoder(**config)
    assert again.config == encoder.config
    for name in ("image_size", "patch_size", "num_kept_prefix_tokens", "mean", "std", "dim"):
        assert getattr(again, name) == getattr(encoder, name)
    again.load_state_dict(encoder.state_dict())


def test_layer_classes_may_be_given_and_are_written_by_name() -> None:
    kwargs = {**UNI2_H, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    by_class = untrained_vision_encoder("timm/vit_giant_patch14_224", image_size=56, kwargs=kwargs)
    assert by_class.config["kwargs"] == UNI2_H


def test_images_take_the_dtype_of_the_weights() -> None:
    encoder = untrained_vision_encoder("coca_vit-l", image_size=32, kwargs=TINY).to(torch.bfloat16)
    assert encoder(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16


def test_blocks_are_the_trunks_own_and_appear_once_in_the_state_dict() -> None:
    encoder = untrained_vision_encoder("coca_vit-l", image_size=32, kwargs=TINY)
    assert [id(block) for block in encoder.blocks] == [id(block) for block in encoder.trunk.blocks]
    assert all(key.startswith("trunk.") for key in encoder.state_dict())


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "coca_vit-b"}, "unknown name 'coca_vit-b'"),
        ({"name": "timm/vit_larg_patch16_224"}, "did you mean .*vit_large_patch16_224"),
        ({"name": "open_clip/ViT-B-15"}, "nearest names: .*ViT-B-16"),
        ({"name": "open_clip/RN50"}, "ResNet tower, which has no tokens"),
        ({"name": "timm/resnet18"}, "isn't a ViT"),
        ({"name": "coca_vit-l", "kwargs": {"depht": 2}}, "depht"),
        ({"name": "open_clip/ViT-B-32", "kwargs": {"depth": 2}}, "no \\['depth'\\]"),
        ({"name": "coca_vit-l", "kwargs": {"pretrained": True}}, "pretrained"),
        ({"name": "coca_vit-l", "kwargs": TINY | {"depth": 10**5}}, "depth must be at most 1,000, found 100000"),
        ({"name": "coca_vit-l", "kwargs": TINY | {"embed_dim": 10**9}}, "embed_dim must be at most 1,000,000"),
        ({"name": "coca_vit-l", "kwargs": TINY, "image_size": 40}, "multiple of the patch size 16, found 40"),
        ({"name": "coca_vit-l", "kwargs": TINY, "tokens": "cls"}, "tokens: must be one of"),
        ({"name": "coca_vit-l", "kwargs": TINY, "mean": [0.5]}, "three numbers"),
        (
            {"name": "timm/vit_base_patch16_siglip_224", "kwargs": TINY, "tokens": "cls_patches"},
            "needs a CLS token",
        ),
    ],
)
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        untrained_vision_encoder(**arguments)


def test_an_image_of_another_size_is_refused_with_both_sizes() -> None:
    encoder = untrained_vision_encoder("coca_vit-l", image_size=32, kwargs=TINY)
    with pytest.raises(ValueError, match="64x32 px, but it was built for 32x32"):
        encoder(torch.randn(1, 3, 64, 32))


def test_an_open_clip_checkpoint_loads_by_its_own_keys(clip_names: dict[str, str], tmp_path: Path) -> None:
    model = open_clip.create_model("tiny-clip").eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "clip.pt")
    encoder = untrained_vision_encoder(clip_names["clip"]).eval()
    load_vision_weights(tmp_path / "clip.pt", encoder)
    images = torch.randn(1, 3, 32, 32)
    assert relative_error(encoder(images)[:, 0] @ model.visual.proj, model.visual(images)) < 1e-5
