"""The multimodal model: image features are projected into the language model's word space and replace placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from composer_path.images.pixels import normalize_image
from composer_path.models.attention import fill_row, pack_attention
from composer_path.models.language_types import check_length_supported, decoder_blocks, decoder_of, go_on, inputs_scale
from composer_path.models.pattern import pick
from composer_path.models.projector import Projector
from composer_path.models.vision_encoder import VisionEncoder

Images = Float[Tensor, "images 3 height width"]  # normalised already
Pixels = UInt8[Tensor, "images 3 height width"] | Images
Features = Float[Tensor, "images vision_tokens vision_dim"]


class PathMLLM(nn.Module):
    """Vision encoder, projector and language model as one plain module.

    A batch is one row of tokens: samples lie one after the other, `cu_seq_lens` are their borders.

    Args:
        vision_encoder: Normalised images to tokens.
        projector: Those tokens to `num_image_tokens` vectors of the language model's width.
        language_model: A transformers causal language model.
    """

    def __init__(self, vision_encoder: VisionEncoder, projector: Projector, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.projector = projector
        self.language_model = language_model
        pack_attention(language_model)
        # How a step is computed, see composer_path/models/execution.py
        self.recomputes_blocks = False
        self.loss_chunk: int | None = None
        self.row_multiple: int | None = None
        self.adapters: tuple[nn.Module, ...] = ()  # LoRA's, see composer_path/models/lora.py

    def forward(
        self,
        input_ids: Int64[Tensor, " tokens"],
        position_ids: Int64[Tensor, " tokens"],
        cu_seq_lens: Int32[Tensor, " borders"],
        max_seq_len: int,
        pixel_values: Pixels | None,
        image_index: Int64[Tensor, " placeholders"],
        logits_index: Int64[Tensor, " targets"] | None = None,
        targets: Int64[Tensor, " targets"] | None = None,
        image_features: Features | None = None,
    ) -> Float[Tensor, "targets vocab"] | Float[Tensor, " targets"]:
        """Logits where a label is, or with `targets` their losses.

        1. Normalise the images, encode them (without gradients where the encoder is frozen) and project them.
        2. Embed the text; put the projected vectors where the placeholders stand.
        3. Run the language model over the row; attention stays inside each sample.
        4. Compute logits at `logits_index` only, and with `targets` the cross entropy of each.

        Args:
            input_ids: Vocabulary ids, negative where an image stands.
            position_ids: Restart at 0 with each sample.
            cu_seq_lens: Borders of the samples in the row, from 0 to its length.
            max_seq_len: Length of the longest sample.
            pixel_values: The row's images in order: uint8, or floats that are normalised already.
            image_index: Positions of the placeholders, in order.
            logits_index: Positions to compute logits at; None for every position.
            targets: The vocabulary ids that should follow at those positions.
            image_features: In place of `pixel_values`, what the vision encoder makes of them.
        """
        image_embeds = self.embed_images(pixel_values) if image_features is None else self.project(image_features)
        inputs_embeds = self.embed_tokens(input_ids, image_embeds, image_index)
        check_length_supported(self.language_model.config, self.longest_in_row(max_seq_len))
        if self.row_multiple is not None:
            inputs_embeds, position_ids, cu_seq_lens, max_seq_len = fill_row(
                inputs_embeds, position_ids, cu_seq_lens, max_seq_len, self.row_multiple
            )
        keywords: dict[str, Any] = {
            "inputs_embeds": inputs_embeds[None],
            "position_ids": position_ids[None],
            "use_cache": False,
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max_seq_len,
            "max_length_k": max_seq_len,
        }
        if targets is not None and self.loss_chunk is not None:
            return self._losses_in_chunks(keywords, logits_index, targets, self.loss_chunk)
        keep = slice(0, input_ids.shape[0]) if logits_index is None else logits_index
        logits = self.language_model(**keywords, logits_to_keep=keep).logits[0]
        return logits if targets is None else token_losses(logits, targets)

    def _losses_in_chunks(
        self,
        keywords: dict[str, Any],
        logits_index: Int64[Tensor, " targets"] | None,
        targets: Int64[Tensor, " targets"],
        size: int,
    ) -> Float[Tensor, " targets"]:
        """Losses without ever holding all logits: those of a chunk are computed again in the backward pass."""
        hidden = decoder_of(self.language_model)(**keywords).last_hidden_state[0]
        hidden = hidden[: len(targets)] if logits_index is None else hidden[logits_index]
        head: nn.Module = self.language_model.get_output_embeddings()

        def losses(rows: Tensor, ids: Tensor) -> Tensor:
            return token_losses(head(rows), ids)

        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(losses, rows, ids, use_reentrant=False) for rows, ids in chunks])

    def embed_images(self, pixel_values: Pixels | None) -> Float[Tensor, "images image_tokens hidden"]:
        """Images to vectors in the language model's word space.

        A row without images still runs one dummy image through vision encoder and projector: under FSDP every rank
        must gather the same weights, and every projector weight must get a gradient, be it 0.
        """
        assert pixel_values is not None
        if pixel_values.shape[0] == 0:
            size = self.vision_encoder.image_size
            dummy = self.embed_images(pixel_values.new_zeros((1, 3, size, size)))
            return dummy[:0] + 0.0 * dummy.sum()
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_image(pixel_values, mean=self.vision_encoder.mean, std=self.vision_encoder.std)
        trained = any(parameter.requires_grad for parameter in self.vision_encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features = self.vision_encoder(pixel_values)
        return self.project(features)

    def project(self, features: Features) -> Float[Tensor, "images image_tokens hidden"]:
        """Vision features to those vectors; none of them still runs a dummy one, see `embed_images`."""
        if features.shape[0] == 0:
            dummy = self.project(features.new_zeros((1, *features.shape[1:])))
            return dummy[:0] + 0.0 * dummy.sum()
        return self.projector(features)

    def embed_tokens(
        self,
        input_ids: Int64[Tensor, " tokens"],
        image_embeds: Float[Tensor, "images image_tokens hidden"],
        image_index: Int64[Tensor, " placeholders"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Word embeddings with the image vectors in the placeholders' stead."""
        embed: nn.Module = self.language_model.get_input_embeddings()
        text_embeds = embed(input_ids.clamp(min=0))
        vectors = image_embeds.flatten(0, 1).to(text_embeds.dtype) / inputs_scale(self.language_model.config)
        if image_index.shape[0] != vectors.shape[0]:
            raise ValueError(
                f"{image_index.shape[0]} image placeholders for {vectors.shape[0]} image vectors ({len(image_embeds)} "
                f"images of {image_embeds.shape[1]}): the data were tokenized for another projector"
            )
        if image_embeds.shape[0] == 0:  # keep the dummy image's zero gradient in the graph
            return text_embeds + image_embeds.sum().to(text_embeds.dtype)
        return text_embeds.index_copy(0, image_index, vectors)

    def num_embeddings(self) -> int:
        """How many vocabulary ids the language model knows."""
        embedding: Any = self.language_model.get_input_embeddings()
        return embedding.num_embeddings

    def longest_in_row(self, max_seq_len: int) -> int:
        """Tokens of a row's longest sample, where the row may be filled up by one more (see `fill_row`)."""
        return max(max_seq_len, self.row_multiple or 0)

    def num_image_tokens(self) -> int:
        """How many tokens an image of the encoder's size takes in the text."""
        size = self.vision_encoder.image_size
        return self.projector.num_image_tokens(self.vision_encoder.num_tokens(size, size))

    @torch.no_grad()
    def generate(
        self, input_ids: Int64[Tensor, " tokens"], pixel_values: Pixels | None = None, **generation: Any
    ) -> Int64[Tensor, " new_tokens"]:
        """Continue one prompt (greedy by default); returns the new tokens only.

        Args:
            input_ids: From `composer_path.tokenize_prompt`, negative where an image stands.
            pixel_values: The prompt's images in order, from `composer_path.load_image`.
            **generation: Keywords of transformers' `generate`, such as `max_new_tokens`, `streamer`, `eos_token_id`.
        """
        device = next(self.language_model.parameters()).device
        images = torch.empty((0, 3, 1, 1), dtype=torch.uint8) if pixel_values is None else pixel_values
        image_index = (input_ids < 0).nonzero()[:, 0]
        image_embeds = self.embed_images(images.to(device))
        embeds = self.embed_tokens(input_ids.to(device), image_embeds, image_index.to(device))
        return go_on(self.language_model, embeds, **generation)

    def trainable(self, patterns: Sequence[str]) -> PathMLLM:
        """Train what these name (`pattern.py`: modules, or parts of them) and nothing else.

        Raises:
            ValueError: One of them names nothing, or nothing more than those before it.
        """
        picked: set[str] = set()
        for pattern in patterns:
            new = pick(self, pattern, "model.trainable")
            if new <= picked:
                raise ValueError(f"model.trainable: '{pattern}' adds nothing to what the others name; remove it")
            picked |= new
        self.requires_grad_(False)
        named = dict(self.named_parameters(remove_duplicate=False))
        for name in picked:
            named[name].requires_grad_(True)
        return self

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Composer asks it which submodules are FSDP units: each block and adapter, the vision encoder, the projector.

        Embeddings, final norm and head stay in the root, tied or not; no unit mixes dtypes.
        """
        blocks = (*decoder_blocks(self.language_model), *self.vision_encoder.blocks)
        return any(module is unit for unit in (self.vision_encoder, self.projector, *blocks, *self.adapters))

    def param_init_fn(self, module: nn.Module) -> None:
        """FSDP1 asks for it on ranks that start empty; their weights then come from rank 0."""


def token_losses(
    logits: Float[Tensor, "targets vocab"], targets: Int64[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """Cross entropy of each answer token, in fp32 (nats)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
