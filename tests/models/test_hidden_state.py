"""An encoder that ends at a hidden state: the numbers of transformers and open_clip, and nothing behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from composer_path.handing_on.llava_hf_vision import stock_tower
from composer_path.models.flops import FlopCounter
from composer_path.models.hidden_state import end_at_layer
from composer_path.models.trunk import VisionTrunk
from composer_path.models.vision_encoder import VisionEncoder, untrained_vision_encoder
from composer_path.weights.assembly import assemble_model
from composer_path.weights.vision_file import build_vision_encoder

NAME = "timm/vit_base_patch16_clip_quickgelu_224.openai"
BLOCKS = 4
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": BLOCKS, "num_heads": 4, "norm_eps": 1e-5}


def small(layer: int | None, **more: Any) -> VisionEncoder:
    return build_vision_encoder(NAME, image_size=32, tokens="patches", layer=layer, kwargs=SMALL, **more).eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A CLIP tower of transformers, and its folder."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8, hidden_act="quick_gelu")).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("layer", [-1, -2, -BLOCKS, 1])
def test_it_is_transformers_hidden_state_of_that_number(clip: tuple[Any, Path], layer: int) -> None:
    model, folder = clip
    encoder = small(layer, weights=str(folder))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images, output_hidden_states=True).hidden_states[layer][:, 1:]
        found = encoder(images)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()  # measured 3e-7
    assert len(encoder.blocks) == (layer if layer > 0 else BLOCKS + 1 + layer)
    assert not any("norm." in name.split("blocks")[0] and "norm_pre" not in name for name in encoder.state_dict())


def test_of_open_clip_it_is_what_that_block_gives() -> None:
    keywords: dict[str, Any] = {"image_size": 64, "kwargs": {"width": 32, "layers": 3, "head_width": 16}}
    whole = untrained_vision_encoder("open_clip/ViT-B-32", **keywords).eval()
    cut = untrained_vision_encoder("open_clip/ViT-B-32", **keywords, layer=-2).eval()
    cut.load_state_dict({name: value for name, value in whole.state_dict().items() if name in cut.state_dict()})
    given: list[torch.Tensor] = []
    whole.blocks[1].register_forward_hook(lambda module, inputs, output: given.append(output))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole(images)
        assert torch.equal(cut(images), given[0])
    assert len(cut.blocks) == 2 and not any("ln_post" in name for name in cut.state_dict())


def test_blocks_behind_it_are_not_counted_trained_or_written() -> None:
    language = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    language |= {"num_attention_heads": 4, "vocab_size": 96}
    models = [
        assemble_model(
            vision_encoder={"name": NAME, "image_size": 32, "kwargs": SMALL, "layer": layer},
            projector={"type": "mlp2x_gelu"},
            language_model={"config": language},
            trainable=["vision_encoder"],
        )
        for layer in (-2, None)
    ]
    cut, whole = models
    assert set(cut.state_dict()) == {
        name
        for name in whole.state_dict()
        if f".blocks.{BLOCKS - 1}." not in name and not name.startswith("vision_encoder.trunk.norm.")
    }
    flops = [FlopCounter(model).needed([40], 1, 3).vision_encoder for model in models]
    patches = 3 * FlopCounter(cut).vision_patches - FlopCounter(cut).vision_patches  # its input gets no gradient
    assert (flops[0] - patches) / (flops[1] - patches) == pytest.approx((BLOCKS - 1) / BLOCKS)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    cut.embed_images(images).sum().backward()
    unused = [name for name, one in cut.vision_encoder.named_parameters() if one.grad is None]
    assert unused == []


def test_it_is_rebuilt_from_its_configuration_and_handed_on_as_a_stock_tower() -> None:
    encoder = small(-2)
    assert json.loads(json.dumps(encoder.config))["layer"] == -2
    again = untrained_vision_encoder(**encoder.config)
    again.load_state_dict(encoder.state_dict())
    assert "layer" not in small(None).config
    tower = stock_tower(encoder, encoder.state_dict())
    assert tower.config["num_hidden_layers"] == BLOCKS - 1


@pytest.mark.parametrize("layer", [0, -BLOCKS - 1, BLOCKS + 1])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer: must be from -4 to -1, or from 1 to 4, .* found {layer}"):
        small(layer)


def test_a_trunk_of_ones_own_has_no_layer() -> None:
    trunk = VisionTrunk(32, patch_size=8, embed_dim=8)
    with pytest.raises(ValueError, match=r"layer: is for timm's ViTs and open_clip's, found 'mine'"):
        end_at_layer(trunk, "mine", -2)
