"""The padded way, written from the reference's description: what padding-free batches are compared with.

Samples are padded to the longest of the batch, transformers' own attention gets a mask, the language model recomputes
each layer in the backward pass, logits are computed at every position and transformers computes the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from composer_path import PathMLLM
from composer_path.images.pixels import normalize_image
from composer_path.records.tokenize import IGNORE_INDEX

PADDING_ID = 0


def pad_samples(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A rectangular batch.

    Args:
        samples: With `input_ids` (negative where an image stands), `labels` and `images`, normalised already.
    """
    input_ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=PADDING_ID),
        "labels": pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
        "images": torch.cat([sample["images"] for sample in samples]),
    }


def with_normalized_images(samples: Sequence[Mapping[str, Any]], model: PathMLLM) -> list[dict[str, Any]]:
    """The same samples with their pixels as the encoder takes them; the reference's loader does this."""
    mean, std = model.vision_encoder.mean, model.vision_encoder.std
    return [dict(sample) | {"images": normalize_image(sample["pixel_values"], mean, std)} for sample in samples]


class PaddedModel(nn.Module):
    """The same three modules, run the padded way; takes and gives what transformers' Trainer expects.

    Args:
        model: Its weights are shared, not copied.
        checkpointing: Whether the language model's layers recompute their activations.
    """

    def __init__(self, model: PathMLLM, checkpointing: bool) -> None:
        super().__init__()
        self.model = model
        set_checkpointing(model, checkpointing)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, images: Tensor) -> dict[str, Tensor]:
        """1. Encode the images without gradients, project. 2. Splice. 3. Language model, all logits, its own loss."""
        llm: Any = self.model.language_model
        embeds = llm.get_input_embeddings()(input_ids.clamp(min=0))
        if len(images):
            with torch.no_grad():
                features = self.model.vision_encoder(images)
            vectors = self.model.projector(features).flatten(0, 1).to(embeds.dtype)
            embeds = embeds.masked_scatter((input_ids < 0)[..., None], vectors)
        output = llm(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, use_cache=False)
        return {"loss": output.loss, "logits": output.logits}


def set_checkpointing(model: PathMLLM, enabled: bool) -> None:
    """Switch recomputation of the language model's layers (non-reentrant: gradients of image vectors survive)."""
    llm: Any = model.language_model
    if enabled:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        llm.gradient_checkpointing_disable()
    model.train()


def padded_loss(padded: PaddedModel, batch: Mapping[str, Tensor]) -> float:
    """Forward and backward pass; the loss."""
    loss = padded(**batch)["loss"]
    loss.backward()
    return loss.item()
