"""Vision weights files: prefixes, other image sizes, and files that must not load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from composer_path.models.vision_encoder import VisionEncoder
from composer_path.weights.tensor_file import WeightsError
from composer_path.weights.vision_file import build_vision_encoder, load_vision_weights

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "init_values": 1e-5}
UNI2_H = {
    **TINY,
    "patch_size": 14,
    "mlp_ratio": 5,
    "no_embed_class": True,
    "reg_tokens": 8,
    "mlp_layer": "SwiGLUPacked",
}


def make(image_size: int = 32, name: str = "timm/vit_large_patch16_224", kwargs: dict | None = None) -> VisionEncoder:
    return build_vision_encoder(name, image_size=image_size, kwargs=TINY if kwargs is None else kwargs)


def assert_same(ours: VisionEncoder, theirs: VisionEncoder) -> None:
    for key, value in theirs.trunk.state_dict().items():
        assert torch.equal(ours.trunk.state_dict()[key], value), key


@pytest.mark.parametrize(
    "prefix", ["", "vision_tower.", "module.", "model.vision_tower.vision_tower.", "visual.trunk."]
)
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_any_prefix_and_kind_of_file_is_read(tmp_path: Path, prefix: str, suffix: str) -> None:
    source, path = make(), tmp_path / f"vision{suffix}"
    tensors = {prefix + key: value for key, value in source.trunk.state_dict().items()}
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    encoder = make()
    load_vision_weights(path, encoder)
    assert_same(encoder, source)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_weights_inside_a_training_checkpoint_are_found(tmp_path: Path, wrapper: str) -> None:
    source, encoder = make(), make()
    torch.save({wrapper: source.trunk.state_dict(), "epoch": 3}, tmp_path / "vision.pth")
    load_vision_weights(tmp_path / "vision.pth", encoder)
    assert_same(encoder, source)


def test_a_classifier_head_is_left_out(tmp_path: Path) -> None:
    source, encoder = make(), make()
    head = {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
    torch.save(source.trunk.state_dict() | head, tmp_path / "vision.pth")
    load_vision_weights(tmp_path / "vision.pth", encoder)
    assert_same(encoder, source)


def test_the_text_tower_of_a_whole_checkpoint_is_left_out(tmp_path: Path) -> None:
    source, encoder = make(), make()
    tensors = {f"visual.trunk.{key}": value for key, value in source.trunk.state_dict().items()}
    tensors |= {"text.positional_embedding": torch.zeros(3), "visual.attn_pool_caption.query": torch.zeros(3)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    load_vision_weights(tmp_path / "pytorch_model.bin", encoder)
    assert_same(encoder, source)


@pytest.mark.parametrize(
    "name, kwargs, file_size, image_size, num_prefix_tokens",
    [
        ("timm/vit_large_patch16_224", TINY, 224, 448, 1),  # UNI's file at 448 px
        ("timm/vit_giant_patch14_224", UNI2_H, 56, 84, 0),  # registers and CLS have no position
        ("timm/vit_large_patch16_224", {**TINY, "reg_tokens": 4}, 32, 64, 5),  # registers have positions
    ],
)
def test_positions_are_resampled_to_another_image_size(
    tmp_path: Path, name: str, kwargs: dict, file_size: int, image_size: int, num_prefix_tokens: int
) -> None:
    source = make(file_size, name, kwargs)
    torch.save(source.trunk.state_dict(), tmp_path / "vision.pth")
    encoder = build_vision_encoder(name, image_size=image_size, kwargs=kwargs, weights=str(tmp_path / "vision.pth"))
    ours, theirs = encoder.trunk.pos_embed, source.trunk.pos_embed
    grid = image_size // encoder.patch_size
    assert ours.shape[1] == grid**2 + num_prefix_tokens
    assert torch.equal(ours[:, :num_prefix_tokens], theirs[:, :num_prefix_tokens])
    expected = resample_abs_pos_embed(theirs, [grid, grid], num_prefix_tokens=num_prefix_tokens)
    assert torch.equal(ours, expected)
    assert encoder(torch.randn(1, 3, image_size, image_size)).shape[1] == encoder.num_tokens(image_size, image_size)


def test_a_smooth_field_of_positions_stays_the_same_field_at_twice_the_size(tmp_path: Path) -> None:
    source, encoder = make(224), make(448)
    centres = (torch.arange(14) + 0.5) / 14
    field = (centres[:, None] + 2 * centres[None]).reshape(1, -1, 1).expand(1, 196, 32)
    with torch.no_grad():
        source.trunk.pos_embed[:, 1:] = field
    torch.save(source.trunk.state_dict(), tmp_path / "vision.pth")
    load_vision_weights(tmp_path / "vision.pth", encoder)
    centres = (torch.arange(28) + 0.5) / 28
    expected = centres[:, None] + 2 * centres[None]
    ours = encoder.trunk.pos_embed[0, 1:, 0].reshape(28, 28)
    inner = slice(4, 24)  # at the border bicubic resampling bends a ramp
    assert (ours - expected)[inner, inner].abs().max() < 1e-5  # measured 2.4e-7; transposed it would be 0.7


@pytest.mark.parametrize(
    "change, message",
    [
        ({"drop": "norm.weight"}, r"missing \(1\): norm.weight"),
        ({"drop": "blocks.1.ls1.gamma"}, r"missing \(1\): blocks.1.ls1.gamma"),
        ({"add": "blocks.2.norm1.weight"}, r"left over \(1\): blocks.2.norm1.weight"),
        ({"add": "norm.bias"}, r"norm.bias: the file has \[3\], the model \[32\]"),
        ({"drop": "patch_embed.proj.weight"}, "holds no ViT of this kind"),
        ({"add": "teacher.patch_embed.proj.weight"}, "several ViTs, under"),
    ],
)
def test_keys_and_shapes_that_differ_are_listed(tmp_path: Path, change: dict, message: str) -> None:
    tensors = dict(make().trunk.state_dict())
    for action, key in change.items():
        if action == "drop":
            del tensors[key]
        else:
            tensors[key] = torch.zeros(3)
    torch.save(tensors, tmp_path / "vision.pth")
    with pytest.raises(WeightsError, match=message):
        load_vision_weights(tmp_path / "vision.pth", make())


def test_keys_outside_of_the_prefix_are_left_over(tmp_path: Path) -> None:
    tensors = {f"vision_tower.{key}": value for key, value in make().trunk.state_dict().items()}
    torch.save(tensors | {"other.weight": torch.zeros(1)}, tmp_path / "vision.pth")
    with pytest.raises(WeightsError, match=r"Left over outside of 'vision_tower\.'.*other\.weight"):
        load_vision_weights(tmp_path / "vision.pth", make())


def test_positions_that_are_no_square_are_refused_with_both_shapes(tmp_path: Path) -> None:
    source = make(kwargs={**TINY, "reg_tokens": 4}, image_size=64)  # 5 prefix tokens and 16 patches
    tensors = {key: value for key, value in source.trunk.state_dict().items() if key != "reg_token"}
    torch.save(tensors, tmp_path / "vision.pth")
    with pytest.raises(WeightsError, match=r"shape \[1, 21, 32\]: less 1 .* isn't a square"):
        load_vision_weights(tmp_path / "vision.pth", make())


def test_weights_are_loaded_where_a_file_is_given(tmp_path: Path) -> None:
    source = build_vision_encoder("coca_vit-l", image_size=32, kwargs=TINY)
    torch.save(source.trunk.state_dict(), tmp_path / "vision.pth")
    loaded = build_vision_encoder("coca_vit-l", image_size=32, kwargs=TINY, weights=str(tmp_path / "vision.pth"))
    random = build_vision_encoder("coca_vit-l", image_size=32, kwargs=TINY)
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert not torch.equal(random.trunk.pos_embed, source.trunk.pos_embed)
