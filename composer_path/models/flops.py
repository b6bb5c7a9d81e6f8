"""How many floating-point operations a step needs, counted from the model's sizes and the batch's lengths.

A product of a [n, k] with a [k, m] matrix is 2nkm operations. What learns costs three forward passes (forward, gradient
of the input, gradient of the weight); what is frozen but passed through on the way to something that learns, two (three
in attention, which has no weights); what is frozen and lies before everything that learns, one. Causal attention counts
half of its square, in layers with a window less what lies outside of it; of experts count those that a token meets.
Norms, activations, embeddings and the optimizer are left out, as is usual: under 1 %.

Legend: w = matrix entries a token is multiplied with, a = width of the queries of all heads together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from composer_path.models.attentional_pooler import AttentionalPooler
from composer_path.models.language_types import decoder_blocks
from composer_path.models.path_mllm import PathMLLM
from composer_path.models.projector import PooledMlp
from composer_path.models.rounded_linear import num_weights


@dataclass(frozen=True)
class PartFlops:
    """Operations by part of the model."""

    vision_encoder: float
    projector: float
    language_model: float
    head: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


class FlopCounter:
    """Counts a batch's operations, from a model whose `requires_grad` flags say what learns.

    Sizes are read once, from the whole model: a sharded one shows a rank its share only.
    """

    def __init__(self, model: PathMLLM) -> None:
        trained = {name: any(p.requires_grad for p in child.parameters()) for name, child in model.named_children()}
        vision, config = model.vision_encoder, model.language_model.config
        self.vision_tokens = vision.num_tokens(vision.image_size, vision.image_size)
        all_tokens = self.vision_tokens - vision.num_kept_prefix_tokens + vision.num_prefix_tokens
        patches = self.vision_tokens - vision.num_kept_prefix_tokens
        # The patches' convolution is a product too; its input, the pixels, never gets a gradient.
        self.vision_patches = 2.0 * patches * sum(num_weights(p) for p in vision.parameters() if p.ndim == 4)
        self.vision_matrices = 2.0 * all_tokens * _matrix_entries(vision.blocks)
        self.vision_attention = 4.0 * all_tokens**2 * vision.dim * len(vision.blocks)
        self.pooled = _pooler_flops(model, self.vision_tokens)
        projector = model.projector  # one's own: as if each vector met every matrix once
        of_each = projector.mlp if isinstance(projector, PooledMlp) else projector
        self.mlp = 2.0 * projector.num_vectors(self.vision_tokens) * _matrix_entries([of_each])
        blocks = decoder_blocks(model.language_model)
        self.body = 2.0 * _matrix_entries(blocks, _share_of_experts(config))
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.attention = 4.0 * heads * head_dim * len(blocks)
        self.num_blocks, self.windows = len(blocks), _windows(config, len(blocks))
        head: Any = model.language_model.get_output_embeddings()
        self.head = 2.0 * num_weights(head.weight)
        self.vision_trained = trained["vision_encoder"]
        self.projector_passes = _passes(trained["projector"], before=self.vision_trained)
        learns_before = self.vision_trained or trained["projector"]
        embedding: Any = model.language_model.get_input_embeddings()
        learns_before = learns_before or embedding.weight.requires_grad
        self.language_passes, self.attention_passes = _passes_of_blocks(blocks, before=learns_before)
        learns_before = learns_before or any(p.requires_grad for p in blocks.parameters())
        self.head_passes = 1 + head.weight.requires_grad + learns_before
        first = any(p.requires_grad for name, p in vision.named_parameters() if "patch_embed" in name or p.ndim == 4)
        self.vision_passes = _passes_of_blocks(vision.blocks, before=first)
        self.patch_passes = 2 if first else 1

    def needed(
        self, lengths: Sequence[int], num_images: int, num_targets: int, *, causal_share: float = 0.5
    ) -> PartFlops:
        """Operations that forward and backward pass of these samples need, however they are computed.

        `lengths` count a sample's tokens, images included; `num_images` and `num_targets` (answer tokens) are those of
        all samples. `causal_share` of attention's square is counted; 1 is for kernels that compute all of it, whatever
        their windows.
        """
        square = self.attention * (self._causal(lengths) if causal_share == 0.5 else causal_share * _squares(lengths))
        matrices = self.body * float(sum(lengths))
        blocks = self.vision_passes[0] * self.vision_matrices + self.vision_passes[1] * self.vision_attention
        per_image, once = self.pooled[0] + self.mlp, self.pooled[1]
        return PartFlops(
            vision_encoder=num_images * (blocks + self.patch_passes * self.vision_patches),
            projector=self.projector_passes * (num_images * per_image + once * (num_images > 0)),
            language_model=self.language_passes * matrices + self.attention_passes * square,
            head=self.head_passes * self.head * num_targets,
        )

    def recomputed(
        self, lengths: Sequence[int], num_images: int, num_targets: int, *, blocks: bool, head: bool
    ) -> float:
        """Operations done twice: `blocks` by `activation_checkpointing: full`, the `head`'s by `loss_chunk`."""
        total = self.head * num_targets if head else 0.0
        if blocks:
            total += self.body * float(sum(lengths)) + self.attention * self._causal(lengths)
            if self.vision_trained:
                total += num_images * (self.vision_matrices + self.vision_attention)
        return total

    def _causal(self, lengths: Sequence[int]) -> float:
        """Pairs of tokens that look at each other, on average over the layers."""
        outside = sum(_squares(max(length - window, 0) for length in lengths) for window in self.windows)
        return 0.5 * (_squares(lengths) - outside / self.num_blocks)


def _squares(lengths: Iterable[int]) -> float:
    return float(sum(length**2 for length in lengths))


def _windows(config: Any, num_blocks: int) -> list[int]:
    """The window of each layer that has one."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return []
    return [window] * (num_blocks if kinds is None else list(kinds).count("sliding_attention"))


def _passes(trained: bool, before: bool) -> int:
    """Forward-sized passes over a part's matrices."""
    return 3 if trained else 2 if before else 1


def _passes_of_blocks(blocks: nn.ModuleList, before: bool) -> tuple[float, float]:
    """The same of a stack of blocks, some of which may learn: over their matrices, and over their attention."""
    entries = matrices = attention = 0.0
    for block in blocks:
        named = list(block.named_parameters())
        attention += 3 if before or any(p.requires_grad for name, p in named if "attn" in name) else 1
        for _, p in named:
            if p.ndim >= 2:
                entries += num_weights(p)
                matrices += num_weights(p) * (1 + p.requires_grad + before)  # forward, of the weight, of the input
            before = before or p.requires_grad
    return matrices / max(entries, 1), attention / max(len(blocks), 1)


def _matrix_entries(modules: Iterable[nn.Module], share_of_experts: float = 1.0) -> float:
    """Entries of all matrices; of a mixture of experts, those that one token meets."""
    matrices = ((name, p) for module in modules for name, p in module.named_parameters() if p.ndim >= 2)
    return sum(
        (num_weights(p) * (share_of_experts if ".experts." in f".{name}." else 1.0) for name, p in matrices), 0.0
    )


def _share_of_experts(config: object) -> float:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen else 1.0


def _pooler_flops(model: PathMLLM, tokens: int) -> tuple[float, float]:
    """Operations of a forward pass of the pooler: for each image, and once for all images."""
    projector = model.projector
    if not isinstance(projector, PooledMlp) or projector.pooler is None or projector.num_queries is None:
        return 0.0, 0.0
    pooler, queries = projector.pooler, projector.num_queries
    query: nn.Parameter = pooler.query  # type: ignore[assignment]
    dim, in_dim = query.shape[1], model.projector.in_dim
    keys_and_values, attention = 2.0 * tokens * 2 * in_dim * dim, 4.0 * queries * tokens * dim
    output = project_query = 2.0 * queries * dim * dim
    for_each = keys_and_values + attention + output
    return (for_each, project_query) if isinstance(pooler, AttentionalPooler) else (for_each + project_query, 0.0)
