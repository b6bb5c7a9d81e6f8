"""Loss and held-out loss: weighted means over answer tokens that don't depend on how samples are batched."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from composer import DataSpec, Trainer
from torch.utils.data import DataLoader

from composer_path import ComposerPathMLLM
from composer_path.batches.batch import Batch, LossAverage, PackedCollator, split_batch
from composer_path.models.composer_model import TokenLoss
from composer_path.models.path_mllm import token_losses
from composer_path.weights.assembly import assemble_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
ANSWERS = (5, 1, 9, 0, 3, 2)  # answer tokens of each sample


@pytest.fixture(scope="module")
def adapter() -> ComposerPathMLLM:
    return ComposerPathMLLM(
        assemble_model(
            vision_encoder={
                "name": "timm/vit_tiny_patch16_224",
                "image_size": 32,
                "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2},
            },
            projector={"pooler": {"dim": 16, "num_queries": 4, "num_heads": 2}, "mlp": {"depth": 2}},
            language_model={"config": {"model_type": "llama", **SIZES}},
            trainable=["projector"],
        )
    )


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, answers in enumerate(ANSWERS):
        ids = torch.randint(3, 96, (14 + index,), generator=generator)
        images = index % 2
        ids[1 : 1 + 4 * images] = -200
        labels = torch.full_like(ids, -100)
        labels[len(ids) - answers :] = ids[len(ids) - answers :]
        made.append(
            {
                "sample_id": index,
                "input_ids": ids,
                "labels": labels,
                "pixel_values": torch.randint(0, 256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8),
                "is_he": torch.zeros(images, dtype=torch.bool),
                "source": "all",
                "problem": None,
            }
        )
    return made


def logits_of(adapter: ComposerPathMLLM, row: Batch) -> torch.Tensor:
    keys = ("input_ids", "position_ids", "cu_seq_lens", "max_seq_len", "pixel_values", "image_index")
    return adapter.model(**{key: getattr(row, key) for key in keys}, logits_index=row.supervised_index)


@pytest.mark.parametrize("loss_average", get_args(LossAverage))
@pytest.mark.parametrize("limit", [20, 40, 1000])
def test_microbatch_losses_times_their_share_sum_to_the_weighted_mean(
    adapter: ComposerPathMLLM, samples: list[dict[str, Any]], loss_average: str, limit: int
) -> None:
    weigh = {"token": lambda n: 1.0, "rank": lambda n: 1.0, "sample": lambda n: 1 / n, "square": lambda n: n**-0.5}
    total = weights = 0.0
    for sample, answers in zip(samples, ANSWERS, strict=True):
        if answers:
            row = PackedCollator()([sample])
            losses = F.cross_entropy(logits_of(adapter, row), row.targets, reduction="none")
            total += weigh[loss_average](answers) * losses.sum().item()
            weights += weigh[loss_average](answers) * answers
    batch = PackedCollator(limit, loss_average)(samples)
    parts = split_batch(batch, len(samples))
    assert (len(parts) > 1) == (limit < 1000)
    loss = sum(adapter.loss(adapter(part), part).item() * part.loss_weight / batch.loss_weight for part in parts)
    assert loss == pytest.approx(total / weights, rel=1e-5)


def test_half_a_weight_is_half_the_loss_and_half_the_gradient(
    adapter: ComposerPathMLLM, samples: list[dict[str, Any]]
) -> None:
    sample = dict(samples[1])  # with an image, so that the projector learns
    answers = (sample["labels"] != -100).nonzero()[:, 0]
    weights = torch.zeros(len(sample["labels"]))
    weights[answers] = 1.0
    weights[answers[0]] = 0.5
    row = PackedCollator()([sample | {"label_weights": weights}])
    whole = PackedCollator()([sample])

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        adapter.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])

    found = gradient(adapter.loss(adapter(row), row))
    losses = adapter(whole)
    expected = gradient((0.5 * losses[0] + losses[1:].sum()) / (len(losses) - 0.5))
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    adapter.zero_grad()


def test_a_microbatch_without_answers_has_loss_0_and_finite_gradients(
    adapter: ComposerPathMLLM, samples: list[dict[str, Any]]
) -> None:
    row = PackedCollator()([samples[3]])
    assert len(row.targets) == 0
    loss = adapter.loss(adapter(row), row)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in adapter.parameters())
    adapter.zero_grad()


def test_the_held_out_loss_is_the_mean_over_tokens_however_they_are_batched(
    adapter: ComposerPathMLLM, samples: list[dict[str, Any]]
) -> None:
    values = []
    for batches in ([samples], [samples[:1], samples[1:]], [[sample] for sample in samples]):
        metric = TokenLoss()
        for batch in batches:
            row = PackedCollator(loss_average="sample")(batch)  # what training averages over doesn't matter here
            adapter.update_metric(row, adapter.eval_forward(row), metric)
        values.append(metric.compute().item())
    row = PackedCollator()(samples)
    expected = F.cross_entropy(logits_of(adapter, row), row.targets).item()
    assert values == pytest.approx([expected] * 3, rel=1e-6)


def test_token_loss_counts_tokens_not_batches() -> None:
    metric = TokenLoss()
    metric.update(torch.tensor([1.0, 2.0, 3.0]))
    metric.update(torch.tensor([10.0]))
    metric.update(torch.zeros(0))
    assert metric.compute().item() == 4.0
    metric.reset()
    assert math.isnan(metric.compute().item())


def test_losses_are_computed_in_fp32_from_bf16_logits() -> None:
    logits = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    losses = token_losses(logits, torch.tensor([1, 2, 3]))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), torch.tensor([1, 2, 3]), reduction="none"))


def test_the_adapter_has_one_child_and_a_metric_for_evaluation_only(adapter: ComposerPathMLLM) -> None:
    assert [name for name, _ in adapter.named_children()] == ["model"]
    assert adapter.get_metrics(is_train=True) == {}
    assert set(adapter.get_metrics()) == {"token_loss"}


@pytest.mark.parametrize("weighted", [True, False])
def test_a_trainer_made_by_hand_that_weighs_wrongly_is_told_before_its_first_step(
    adapter: ComposerPathMLLM, samples: list[dict[str, Any]], weighted: bool
) -> None:
    spec = DataSpec(
        DataLoader(samples, batch_size=6, collate_fn=PackedCollator()),  # type: ignore[arg-type]
        split_batch=split_batch,
        get_num_samples_in_batch=lambda batch: batch.num_samples,
        get_num_tokens_in_batch=lambda batch: {"total": len(batch.input_ids), "loss_generating": batch.loss_weight},
    )
    model = ComposerPathMLLM(adapter.model)
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0 if weighted else 0.1),
        max_duration="1ba",
        device="cpu",
        device_train_microbatch_size=3,
        accumulate_train_batch_on_tokens=weighted,
        progress_bar=False,
    )
    if weighted:
        trainer.fit()
    else:
        with pytest.raises(ValueError, match="must be made with accumulate_train_batch_on_tokens=True"):
            trainer.fit()
    trainer.close()
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
