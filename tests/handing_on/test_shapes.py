"""What `export --as` writes is what other programs read: the same numbers, and nothing of anybody else's is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handed_models import CLIP, COCA, IMAGES, MLP, POOLED, logits_of, pixels_of, prompt_of, trained
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer_path import load_reference_model
from composer_path.handing_on.language_model_folder import write_language_model
from composer_path.handing_on.llava_hf import write_llava_hf
from composer_path.handing_on.onnx_file import FILE, check_graph, plain_embedder, write_onnx
from composer_path.handing_on.peft_folder import write_peft
from composer_path.handing_on.projector_folder import write_projector_folder
from composer_path.handing_on.reference_folder import write_reference
from composer_path.handing_on.trained_model import whole_weights
from composer_path.records.vocabulary import load_tokenizer, num_ids
from composer_path.run.published import WRITTEN
from composer_path.weights.assembly import assemble_model
from composer_path.weights.projector_file import build_projector
from composer_path.weights.vision_file import build_vision_encoder
from composer_path.weights.whole_folder import sections_of

PICTURE = sorted(path.name for path in IMAGES.iterdir())[0]
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "llama with long RoPE": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen2": {"model_type": "qwen2"},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "pad_token_id": 0},
}


@pytest.mark.parametrize("kind", LANGUAGES)
def test_the_language_model_alone_gives_our_logits(tmp_path: Path, kind: str) -> None:
    found = trained(language=LANGUAGES[kind])
    write_language_model(tmp_path / "out", found)
    # Gemma 2 caps its attention, which transformers 4's sdpa leaves out.
    how = {"attn_implementation": "eager", "output_loading_info": True}
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not found.model.language_model.config.tie_word_embeddings)
    ids = prompt_of(found, "What is shown?", 0)
    with torch.no_grad():
        theirs = stock(input_ids=ids[None]).logits[0]
        ours = logits_of(found, ids, torch.zeros(0, 3, 32, 32))
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()  # measured 4e-7
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == found.tokenizer.get_vocab()


def test_a_language_model_in_bf16_is_ours_rounded(tmp_path: Path) -> None:
    found = trained()
    write_language_model(tmp_path / "out", found, "bf16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = found.weights["language_model.lm_head.weight"].bfloat16()
    assert torch.equal(stored["lm_head.weight"], expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype="auto").dtype == torch.bfloat16


def test_the_reference_folder_has_what_its_builder_looks_for(tmp_path: Path, llama2_tokenizer_path: Path) -> None:
    found = trained(COCA, POOLED, vocabulary=llama2_tokenizer_path)
    write_reference(tmp_path / "out", found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tokenizer_model_max_length"] == 256 and config["image_aspect_ratio"] == "pad"
    assert (tmp_path / "out" / "tokenizer.model").is_file() and config["mm_vision_tower"] == "coca_vit-l"
    again = load_reference_model(tmp_path / "out", image_size=32, num_heads=2)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in found.weights.items())
    # Its vision tower is made anew from a file of its own: all that the tower has, under the reference's prefix.
    tower = torch.load(tmp_path / "out" / "vision_tower.pt", weights_only=True)
    assert all(key.startswith("vision_tower.") for key in tower)
    encoder = build_vision_encoder(**COCA, weights=str(tmp_path / "out" / "vision_tower.pt"))
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, found.weights[f"vision_encoder.{key}"]), key


def test_marks_around_images_are_words_in_the_reference_folder_and_nowhere_in_a_stock_llava(
    tmp_path: Path, llama2_tokenizer_path: Path
) -> None:
    found = trained(COCA, POOLED | {"image_marks": True}, vocabulary=llama2_tokenizer_path)
    write_reference(tmp_path / "out", found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tokenizer = load_tokenizer(tmp_path / "out")
    first, second = (tokenizer.get_vocab()[word] for word in ("<im_start>", "<im_end>"))
    assert config["mm_use_im_start_end"] is True and (first, second) == (32000, 32001)
    assert config["vocab_size"] == num_ids(tokenizer) == 32002
    model = assemble_model(**_small_tower(tmp_path / "out"), trainable=["projector"])
    assert torch.equal(model.projector.marks, found.weights["projector.marks"])
    stock = trained(CLIP, MLP | {"image_marks": True})
    with pytest.raises(ValueError, match="--as llava-hf: a stock LLaVA has no marks around images"):
        write_llava_hf(tmp_path / "stock", stock)


def _small_tower(folder: Path) -> dict[str, Any]:
    """The folder's sections; how many heads its ViT has, no file says."""
    sections = sections_of(folder)
    sections["vision_encoder"]["kwargs"]["num_heads"] = 2
    return sections


def test_what_the_reference_would_ask_otherwise_is_refused(tmp_path: Path) -> None:
    chat = {"name": "llava_llama_2", "system": "Be brief."}
    with pytest.raises(ValueError, match="llava_llama_2 with another system message"):
        write_reference(tmp_path / "out", trained(COCA, POOLED, template=chat))
    with pytest.raises(ValueError, match="no place for: vision encoder 'timm/"):
        write_reference(tmp_path / "out", trained(projector=POOLED))
    assert not (tmp_path / "out").exists()


def test_the_projector_alone_loads_and_names_its_encoder(tmp_path: Path) -> None:
    found = trained(projector=POOLED)
    write_projector_folder(tmp_path / "out", found)
    again = build_projector(
        weights=str(tmp_path / "out"), vision_encoder=found.model.vision_encoder, in_dim=24, out_dim=32, **POOLED
    )
    assert all(torch.equal(value, found.weights[f"projector.{key}"]) for key, value in again.state_dict().items())
    found.model.vision_encoder.trunk.cls_token.data += 1
    with pytest.raises(ValueError, match="was trained with another encoder"):
        build_projector(
            weights=str(tmp_path / "out"), vision_encoder=found.model.vision_encoder, in_dim=24, out_dim=32, **POOLED
        )


def test_the_graph_gives_our_image_vectors_for_any_number_of_images(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    found = trained(projector=POOLED)
    write_onnx(tmp_path / "out", found)
    file = tmp_path / "out" / FILE
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FILE, WRITTEN}
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    pixels = pixels_of(found, *[PICTURE] * 5)
    with torch.no_grad():
        ours = found.model.embed_images(pixels).numpy()
    theirs = session.run(None, {"pixel_values": pixels.numpy()})[0]
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(ours).max()  # measured 6e-7
    facts = session.get_modelmeta().custom_metadata_map
    assert (
        json.loads(facts["composer_path.num_image_tokens"]) == 4 and json.loads(facts["composer_path.image_size"]) == 32
    )
    assert onnx.load(str(file)).opset_import[0].version == 18


@pytest.mark.slow
def test_a_graph_with_other_numbers_is_refused(tmp_path: Path) -> None:
    found = trained(projector=POOLED)
    write_onnx(tmp_path / "out", found)
    other = plain_embedder(found.model, whole_weights(found, "fp32"))
    other.projector.mlp[2].bias.data += 1e-2
    with pytest.raises(ValueError, match="numbers differ by"):
        check_graph(tmp_path / "out" / FILE, other)


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composer_path.handing_on.onnx_file.find_spec", lambda name: None if name == "onnx" else 1)
    with pytest.raises(ValueError, match=r"^--as onnx: needs onnx; pip install onnx$"):
        write_onnx(tmp_path / "out", trained())


def test_stock_peft_puts_the_adapters_on_the_language_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    found = trained(lora={"language_model": {"r": 2, "lora_alpha": 4}})
    write_peft(tmp_path / "adapters", found)
    write_language_model(tmp_path / "merged", found)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merged = {key: value.clone() for key, value in base.state_dict().items()}
    plain = {
        key.removeprefix("language_model.").replace(".base_layer.", "."): value
        for key, value in found.weights.items()
        if key.startswith("language_model.") and "lora_" not in key
    }
    base.load_state_dict(plain)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapters" / "language_model").merge_and_unload()
    changed = [key for key in plain if not torch.equal(plain[key], merged[key])]
    assert len(changed) == 14
    for key, value in model.state_dict().items():
        assert torch.allclose(value, merged[key], atol=1e-6), key


def test_a_model_without_adapters_has_none_to_hand_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--as peft: needs adapters, found none"):
        write_peft(tmp_path / "out", trained())
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_is_replaced_with_its_evaluation_and_what_is_others_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_language_model(out, trained())
    (out / "notes.txt").write_text("ours")
    (out / "evaluation.json").write_text("{}")
    found = trained(language={"tie_word_embeddings": True})
    write_language_model(out, found)
    assert not (out / "evaluation.json").exists() and (out / "notes.txt").read_text() == "ours"
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    write_projector_folder(out, found)  # another shape in its place leaves nothing of the earlier one
    assert {path.name for path in out.iterdir()} == {
        "notes.txt",
        "config.json",
        "projector.safetensors",
        "mm_projector.bin",
        WRITTEN,
    }


@pytest.mark.parametrize("theirs", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer_config.json"])
def test_nothing_of_another_program_is_written_over(tmp_path: Path, theirs: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / theirs).write_text("theirs")
    with pytest.raises(ValueError, match=f"found {theirs}; choose another place"):
        write_language_model(out, trained())
    assert [path.name for path in out.iterdir()] == [theirs] and (out / theirs).read_text() == "theirs"


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_language_model(out, trained())
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("composer_path.weights.folder.write_tensors", fail)
    with pytest.raises(OSError, match="No space left"):
        write_language_model(out, trained(language={"tie_word_embeddings": True}))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
