"""Our step: the real collator's row, cut by the real `split_batch`, through `ComposerPathMLLM`'s forward and loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from composer_path import ComposerPathMLLM, PathMLLM
from composer_path.batches.batch import Batch, split_batch
from composer_path.images.pixels import normalize_image
from composer_path.models.path_mllm import token_losses


def packed_loss(adapter: ComposerPathMLLM, batch: Batch, *, all_logits: bool = False) -> float:
    """Forward and backward pass over a device batch, weighted as Composer does; the loss.

    Args:
        adapter: What Composer trains.
        batch: From `PackedCollator`.
        all_logits: Compute logits at every position, then pick those with a label: what the option saves.
    """
    total = 0.0
    for part in split_batch(batch, len(batch.num_images)):
        losses = losses_of_every_logit(adapter, part) if all_logits else adapter(part)
        loss = adapter.loss(losses, part) * (part.loss_weight / batch.loss_weight)
        loss.backward()
        total += loss.item()
    return total


def losses_of_every_logit(adapter: ComposerPathMLLM, part: Batch) -> Tensor:
    """Logits at all positions of the row, and the losses of those with a label."""
    keys = ("input_ids", "position_ids", "cu_seq_lens", "max_seq_len", "pixel_values", "image_index")
    logits = adapter.model(**{key: getattr(part, key) for key in keys})
    return token_losses(logits[part.supervised_index], part.targets)


@contextmanager
def given_features(model: PathMLLM, batch: Batch) -> Iterator[Batch]:
    """Within it the vision encoder returns what it computed before, as if features came with the shards.

    Yields:
        The batch with empty pixels in the images' stead, so that nothing is normalised either.
    """
    encoder = model.vision_encoder
    size = encoder.image_size
    with torch.no_grad():
        pixels = normalize_image(batch.pixel_values, mean=encoder.mean, std=encoder.std)
        features = encoder(pixels) if len(pixels) else torch.zeros(0, encoder.num_tokens(size, size), encoder.dim)
    served = 0

    def serve(pixels: Tensor) -> Tensor:
        nonlocal served
        if pixels.shape[-1] == size:  # the dummy image of a row without any
            return features.new_zeros(len(pixels), *features.shape[1:])
        served += len(pixels)
        return features[served - len(pixels) : served]

    encoder.__dict__["forward"] = serve  # found before the class's own
    try:
        yield replace(batch, pixel_values=torch.zeros(len(features), 3, 1, 1))
    finally:
        del encoder.__dict__["forward"]
