"""The whole model equals the reference, and padding-free rows equal one sample at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from composer_path import ComposerPathMLLM, PathMLLM, load_reference_model
from composer_path.batches.batch import Batch, PackedCollator, split_batch
from composer_path.weights.assembly import assemble_model
from composer_path.weights.reference import to_reference

NUM_IMAGE_TOKENS = 128
VISION = {
    "name": "timm/vit_tiny_patch16_224",
    "image_size": 32,
    "kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2},
}
PROJECTOR = {"pooler": {"dim": 16, "num_queries": 4, "num_heads": 2}, "mlp": {"depth": 2}}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LANGUAGE_MODELS = {
    "llama_2": {"model_type": "llama", **SIZES, "num_key_value_heads": 4},
    "llama_3_gqa": {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "rope_theta": 500000.0},
    "mistral": {"model_type": "mistral", **SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", **SIZES, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "tied": {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
}


def sample(sample_id: int, input_ids: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor) -> dict[str, Any]:
    return {
        "sample_id": sample_id,
        "input_ids": input_ids,
        "labels": labels,
        "pixel_values": pixels,
        "is_he": torch.ones(len(pixels), dtype=torch.bool),
        "source": "all",
        "problem": None,
    }


def random_sample(sample_id: int, length: int, num_images: int, num_labels: int, generator: torch.Generator) -> dict:
    ids = torch.randint(3, 96, (length,), generator=generator)
    for image in range(num_images):
        ids[1 + 5 * image : 5 + 5 * image] = -200
    labels = torch.full((length,), -100)
    labels[-num_labels:] = ids[-num_labels:]
    pixels = torch.randint(0, 256, (num_images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return sample(sample_id, ids, labels, pixels)


def golden_batch(golden: Path, limit: int | None = None) -> Batch:
    """The reference's batch as one row: placeholders expanded, padding removed, cut as the reference cut it."""
    batch = load_file(golden / "model" / "batch.safetensors")
    samples = []
    for index in range(len(batch["input_ids"])):
        ids, labels = (batch[key][index][batch["attention_mask"][index]] for key in ("input_ids", "labels"))
        at = (ids == -200).nonzero()[:, 0].tolist()
        for position in at:
            ids = torch.cat([ids[:position], torch.full((NUM_IMAGE_TOKENS,), -200), ids[position + 1 :]])
            blank = torch.full((NUM_IMAGE_TOKENS,), -100)
            labels = torch.cat([labels[:position], blank, labels[position + 1 :]])
        pixels = batch["images"][index : index + 1] if at else batch["images"][:0]
        samples.append(sample(index, ids[:limit], labels[:limit], pixels))
    return PackedCollator()(samples)


def every_logit(model: PathMLLM, batch: Batch) -> torch.Tensor:
    keys = ("input_ids", "position_ids", "cu_seq_lens", "max_seq_len", "pixel_values", "image_index")
    return model(*(getattr(batch, key) for key in keys))


def reference_model(golden: Path) -> PathMLLM:
    return load_reference_model(golden / "model", image_size=64, patch_size=16, num_heads=4)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(("name", "limit"), [("full", None), ("truncated140", 140)])
def test_logits_loss_and_every_gradient_equal_the_reference(golden: Path, name: str, limit: int | None) -> None:
    expected = load_file(golden / "model" / "expected.safetensors")
    model = reference_model(golden).trainable(["projector", "language_model"])
    adapter = ComposerPathMLLM(model)
    batch = golden_batch(golden, limit)
    logits = every_logit(model, batch).detach()
    for at in range(len(batch.num_images)):
        start, stop = batch.cu_seq_lens[at : at + 2].tolist()
        theirs = expected[f"{name}.logits"][at, : stop - start]
        assert relative(logits[start:stop], theirs) < 1e-5  # measured 6.2e-7
    loss = adapter.loss(adapter(batch), batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected[f"{name}.loss"].item(), rel=1e-6)  # measured 7.3e-8
    gradients = to_reference({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    prefix = f"{name}.grad."
    theirs = {key.removeprefix(prefix): value for key, value in expected.items() if key.startswith(prefix)}
    assert set(gradients) == set(theirs)
    errors = {key: relative(gradients[key], theirs[key]) for key in theirs}
    assert max(errors.values()) < 1e-4, errors  # measured 1.3e-6


@pytest.mark.parametrize(
    ("name", "modules", "lr"),
    [("adapter_only", ["projector"], 2e-3), ("full_finetune", ["projector", "language_model"], 1e-3)],
)
def test_ten_adamw_steps_of_each_stage_equal_the_reference(
    golden: Path, name: str, modules: list[str], lr: float
) -> None:
    expected = load_file(golden / "model" / "expected.safetensors")[f"{name}.losses"]
    model = reference_model(golden).trainable(modules)
    adapter = ComposerPathMLLM(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    batch = golden_batch(golden)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = adapter.loss(adapter(batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    ours = torch.tensor(losses, dtype=torch.float64)
    assert ((ours - expected).abs() / expected).max().item() < 1e-4  # measured 1.6e-7


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("images", ["with", "without", "mixed"])
def test_a_row_of_samples_equals_one_sample_at_a_time(kind: str, images: str) -> None:
    generator = torch.Generator().manual_seed(3)
    counts = {"with": (1, 2, 1, 1), "without": (0, 0, 0, 0), "mixed": (1, 0, 2, 0)}[images]
    samples = [
        random_sample(index, length, count, labels, generator)
        for index, (length, count, labels) in enumerate(zip((23, 16, 31, 17), counts, (5, 3, 9, 1), strict=True))
    ]
    model = assemble_model(
        vision_encoder=VISION,
        projector=PROJECTOR,
        language_model={"config": LANGUAGE_MODELS[kind]},
        trainable=["projector", "language_model"],
    )
    adapter = ComposerPathMLLM(model)
    row = PackedCollator()(samples)

    def losses_and_gradients(batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
        adapter.zero_grad()
        total = 0.0
        for batch in batches:
            loss = adapter.loss(adapter(batch), batch) * (batch.loss_weight / row.loss_weight)
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}

    singly = losses_and_gradients([PackedCollator()([one]) for one in samples])
    for batches in ([row], split_batch(PackedCollator(40)(samples), 4)):
        loss, gradients = losses_and_gradients(batches)
        assert loss == pytest.approx(singly[0], rel=1e-5)  # measured 2.0e-7
        assert set(gradients) == set(singly[1])
        for name, gradient in gradients.items():
            scale = max(singly[1][name].norm().item(), 1e-6)
            assert (gradient - singly[1][name]).norm().item() / scale < 1e-5, name  # measured 8.1e-7


def test_a_row_without_images_still_gives_every_projector_weight_a_gradient() -> None:
    model = assemble_model(
        vision_encoder=VISION,
        projector=PROJECTOR,
        language_model={"config": LANGUAGE_MODELS["llama_2"]},
        trainable=["projector"],
    )
    adapter = ComposerPathMLLM(model)
    batch = PackedCollator()([random_sample(0, 12, 0, 3, torch.Generator().manual_seed(0))])
    adapter.loss(adapter(batch), batch).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())
    assert all(p.grad is None for p in model.language_model.parameters())


def test_logits_are_computed_only_where_a_label_is(golden: Path) -> None:
    model = reference_model(golden)
    batch = golden_batch(golden)
    keys = ("input_ids", "position_ids", "cu_seq_lens", "max_seq_len", "pixel_values", "image_index")
    some = model(*(getattr(batch, key) for key in keys), logits_index=batch.supervised_index)
    assert some.shape[0] == len(batch.targets) < len(batch.input_ids)
    torch.testing.assert_close(some, every_logit(model, batch)[batch.supervised_index])


def test_counts_of_placeholders_and_vectors_that_differ_are_both_named(golden: Path) -> None:
    batch = golden_batch(golden)
    batch = replace(batch, image_index=batch.image_index[:-1])
    with pytest.raises(ValueError, match=r"383 image placeholders for 384 image vectors \(3 images of 128\)"):
        ComposerPathMLLM(reference_model(golden))(batch)


@pytest.mark.parametrize("kind", ["llama_3_gqa", "tied"])
def test_a_saved_folder_loads_to_the_same_logits(tmp_path: Path, kind: str) -> None:
    model = assemble_model(
        vision_encoder=VISION,
        projector=PROJECTOR,
        language_model={"config": LANGUAGE_MODELS[kind]},
        trainable=["projector"],
    )
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = PathMLLM.from_pretrained(tmp_path)
    batch = PackedCollator()([random_sample(0, 20, 1, 3, torch.Generator().manual_seed(0))])
    assert torch.equal(every_logit(model, batch), every_logit(again, batch))


def test_frozen_parts_in_bf16_work_beside_trained_ones_in_fp32(tmp_path: Path) -> None:
    model = assemble_model(
        vision_encoder=VISION,
        projector=PROJECTOR,
        language_model={"config": LANGUAGE_MODELS["llama_3_gqa"]},
        trainable=["projector"],
        frozen_dtype=torch.bfloat16,
    )
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    adapter = ComposerPathMLLM(model)
    batch = PackedCollator()([random_sample(0, 20, 1, 3, torch.Generator().manual_seed(0))])
    adapter.loss(adapter(batch), batch).backward()
    assert {p.grad.dtype for p in model.projector.parameters() if p.grad is not None} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = PathMLLM.from_pretrained(tmp_path)
    assert torch.equal(every_logit(model, batch), every_logit(again, batch))
    prompt = random_sample(0, 14, 1, 1, torch.Generator().manual_seed(5))
    keywords = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": -1}
    assert len(again.generate(prompt["input_ids"], prompt["pixel_values"], **keywords)) == 4


def test_generation_with_a_cache_equals_asking_for_each_token_anew() -> None:
    model = assemble_model(
        vision_encoder=VISION,
        projector=PROJECTOR,
        language_model={"config": LANGUAGE_MODELS["llama_3_gqa"]},
        trainable=[],
    ).eval()
    prompt = random_sample(0, 14, 2, 1, torch.Generator().manual_seed(5))
    new = model.generate(prompt["input_ids"], prompt["pixel_values"], max_new_tokens=6, pad_token_id=0, eos_token_id=-1)
    ids = prompt["input_ids"]
    for _ in range(6):
        logits = every_logit(
            model, PackedCollator()([prompt | {"input_ids": ids, "labels": torch.full_like(ids, -100)}])
        )
        ids = torch.cat([ids, logits[-1].argmax()[None]])
    assert new.tolist() == ids[-6:].tolist()


def test_the_language_model_called_directly_is_a_stock_one_with_padding(golden: Path) -> None:
    model = reference_model(golden).language_model
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    padded = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[0, 4:]
    alone = model(input_ids=ids[:1, 4:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("without_type_checks")
def test_unknown_modules_to_train_are_refused(golden: Path) -> None:
    with pytest.raises(ValueError, match="vision_tower"):
        reference_model(golden).trainable(["vision_tower"])
