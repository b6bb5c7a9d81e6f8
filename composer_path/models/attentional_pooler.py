"""Attentional poolers: learned queries that turn the many tokens of an image into a few, of two kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

PoolerKind = Literal["reference", "open_clip"]


@dataclass(frozen=True)
class PoolerSettings:
    """What a pooler is made from; by default the one that the reference takes over from its CoCa.

    Attributes:
        kind: `reference` (`AttentionalPooler`) or `open_clip` (`OpenClipAttentionalPooler`).
        dim: Width of the queries and of the output.
        num_queries: Number of tokens that come out.
        num_heads: Attention heads; must divide `dim`.
    """

    kind: PoolerKind = "reference"
    dim: int = 768
    num_queries: int = 128
    num_heads: int = 8


class AttentionalPooler(nn.Module):
    """The reference's pooler: learned queries attend to the image's tokens; no projection has a bias.

    Keys and values come from one matrix (keys first), heads are contiguous slices of the width, scores are scaled by
    head width ** -0.5: found by parity with the reference's outputs. `in_dim` is the width of the image's tokens, for
    the others see `PoolerSettings`.
    """

    def __init__(self, in_dim: int, dim: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(num_queries, dim))
        self.ln_k = nn.LayerNorm(in_dim)
        self.ln_q = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(in_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Float[Tensor, "images tokens in_dim"]) -> Float[Tensor, "images queries dim"]:
        """1. Project the queries once for all images. 2. Keys and values. 3. Attend. 4. Join the heads."""
        query = self._split_heads(self.to_q(self.ln_q(self.query)).unsqueeze(0))
        key, value = self.to_kv(self.ln_k(features)).chunk(2, dim=-1)
        query = query.expand(features.shape[0], -1, -1, -1)
        pooled = F.scaled_dot_product_attention(query, self._split_heads(key), self._split_heads(value))
        return self.to_out(pooled.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Float[Tensor, "images tokens dim"]) -> Float[Tensor, "images heads tokens head_dim"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class OpenClipAttentionalPooler(nn.Module):
    """open_clip's pooler, the one of CoCa and CONCH: `nn.MultiheadAttention` with biases.

    Parameter names and numbers are those of `open_clip.transformer.AttentionalPooler`, so its weights load as they are.
    """

    def __init__(self, in_dim: int, dim: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_queries, dim))
        self.attn = nn.MultiheadAttention(dim, num_heads, kdim=in_dim, vdim=in_dim, batch_first=True)
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(in_dim)

    def forward(self, features: Float[Tensor, "images tokens in_dim"]) -> Float[Tensor, "images queries dim"]:
        """1. Normalise the tokens and the queries. 2. Attend."""
        features = self.ln_k(features)
        query = self.ln_q(self.query).unsqueeze(0).expand(features.shape[0], -1, -1)
        return self.attn(query, features, features, need_weights=False)[0]


POOLERS: dict[PoolerKind, type[nn.Module]] = {"reference": AttentionalPooler, "open_clip": OpenClipAttentionalPooler}
