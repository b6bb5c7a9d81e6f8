"""The projector: turns the vision encoder's tokens into the vectors that stand in the language model's input.

To add one: a subclass of `Projector` in a module that the YAML imports (docs/extending.md).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composer_path.models.attentional_pooler import POOLERS, PoolerKind, PoolerSettings
from composer_path.own_parts.registry import own_classes

REFERENCE_TYPE = re.compile(r"(?P<pooler>attn_pool\+)?(?:(?P<linear>linear)|mlp(?P<depth>[1-9]\d*)x_gelu|identity)")

NUM_MARKS = 2  # one before an image, one behind it

Settings = TypeVar("Settings", "MlpSettings", PoolerSettings)


@dataclass(frozen=True)
class MlpSettings:
    """What the MLP is made from: `depth` linear layers with GELU between them; 0 is the identity."""

    depth: int = 2


class Projector(nn.Module):
    """What all projectors share; one of one's own is derived from it, and says `project`.

    Args:
        in_dim: Width of the vision encoder's tokens.
        out_dim: Width of the language model.

    Attributes:
        config: Keywords of `untrained_projector` that rebuild it, without its weights.
        marks: What stands before an image's vectors, and behind them; None where nothing does.
    """

    config: dict[str, Any]
    marks: nn.Parameter | None

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        self.register_parameter("marks", None)

    def mark_images(self) -> None:
        """Put a learned vector before each image's vectors and one behind them; zeros, until they are given values.

        Raises:
            ValueError: A class of one's own that counts image tokens itself.
        """
        if type(self).num_image_tokens is not Projector.num_image_tokens:
            found = f"found {type(self).__name__}.num_image_tokens; call it num_vectors"
            raise ValueError(f"projector.image_marks: a class of one's own must not count the marks itself, {found}")
        self.marks = nn.Parameter(torch.zeros(NUM_MARKS, self.out_dim))
        self.config = self.config | {"image_marks": True}

    def forward(self, features: Float[Tensor, "images tokens dim"]) -> Float[Tensor, "images image_tokens hidden"]:
        """1. Check the width. 2. Take the weights' dtype. 3. Project. 4. Put the marks around each image."""
        if features.shape[-1] != self.in_dim:
            raise ValueError(
                f"projector: features of width {features.shape[-1]} came in, but it was built for width {self.in_dim} "
                "(the vision encoder's dim)"
            )
        weight = next(self.parameters(), features)  # the identity has none
        vectors = self.project(features.to(weight.dtype))  # a frozen encoder may be in bf16 beside an fp32 projector
        counts = self.num_image_tokens if self.marks is None else self.num_vectors
        expected = (features.shape[0], counts(features.shape[1]), self.out_dim)
        if tuple(vectors.shape) != expected:
            found = f"found {tuple(vectors.shape)} of {type(self).__name__}; correct project or {counts.__name__}"
            raise ValueError(f"projector: must give {expected} (images, image tokens, width); {found}")
        if self.marks is None:
            return vectors
        start, end = self.marks.to(vectors.dtype).expand(vectors.shape[0], -1, -1).split(1, dim=1)
        return torch.cat([start, vectors, end], dim=1)

    def project(self, features: Float[Tensor, "images tokens dim"]) -> Float[Tensor, "images image_tokens hidden"]:
        """What it makes of the tokens, which have its weights' dtype."""
        raise NotImplementedError

    def num_vectors(self, num_tokens: int) -> int:
        """How many vectors `project` makes of an image for which the vision encoder gives `num_tokens` tokens."""
        return num_tokens

    def num_image_tokens(self, num_tokens: int) -> int:
        """How many tokens such an image takes in the text: its vectors, and the marks around them."""
        return self.num_vectors(num_tokens) + (0 if self.marks is None else NUM_MARKS)


class PooledMlp(Projector):
    """An optional attentional pooler with its LayerNorm, then an MLP: the reference's projectors."""

    def __init__(self, in_dim: int, out_dim: int, *, pooler: PoolerSettings | None, mlp: MlpSettings) -> None:
        super().__init__(in_dim, out_dim)
        self.config = {"in_dim": in_dim, "out_dim": out_dim, "pooler": pooler and asdict(pooler)}
        self.config["mlp"] = asdict(mlp)
        width = in_dim
        self.num_queries: int | None = None
        self.pooler: nn.Module | None = None
        self.ln: nn.Module | None = None
        if pooler is not None:
            width = pooler.dim
            if width % pooler.num_heads:
                found = f"found dim {width} and num_heads {pooler.num_heads}"
                raise ValueError(f"projector.pooler: dim must be divisible by num_heads, {found}")
            self.num_queries = pooler.num_queries
            self.pooler = POOLERS[pooler.kind](in_dim, width, pooler.num_queries, pooler.num_heads)
            self.ln = nn.LayerNorm(width)
        if mlp.depth == 0 and width != out_dim:
            raise ValueError(
                f"projector.mlp: depth 0 (identity) can't change the width, but {width} comes in and the language "
                f"model's width is {out_dim}; take depth 1 or more"
            )
        layers: list[nn.Module] = []
        for index in range(mlp.depth):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)] if index else [nn.Linear(width, out_dim)]
        self.mlp = nn.Sequential(*layers)

    def project(self, features: Float[Tensor, "images tokens dim"]) -> Float[Tensor, "images image_tokens hidden"]:
        """1. Pool and normalise, if there is a pooler. 2. MLP."""
        if self.pooler is not None and self.ln is not None:
            features = self.ln(self.pooler(features))
        return self.mlp(features)

    def num_vectors(self, num_tokens: int) -> int:
        """As many as there are queries, or tokens."""
        return num_tokens if self.num_queries is None else self.num_queries


def untrained_projector(
    *,
    in_dim: int,
    out_dim: int,
    type: str | None = None,
    pooler: dict[str, Any] | None = None,
    mlp: dict[str, Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    image_marks: bool | None = None,
) -> Projector:
    """A projector from the YAML's keys, with random weights.

    Args:
        in_dim: Width of the vision encoder's tokens.
        out_dim: Width of the language model.
        type: A name of the reference's: `attn_pool+mlp2x_gelu`, `attn_pool+linear`, `linear`, `mlpNx_gelu`, `identity`.
            Without `type`, `pooler` and `mlp` it is `attn_pool+mlp2x_gelu`. Or the name of a class of one's own.
        pooler: `{kind: reference | open_clip, dim: 768, num_queries: 128, num_heads: 8}`; what isn't given has the
            value shown. Without `type`, leaving `pooler` out means no pooler.
        mlp: `{depth: N}`: 0 identity, 1 one linear layer, 2 (the default) linear, GELU, linear.
        kwargs: Keywords of a class of one's own.
        image_marks: A learned vector before each image and one behind it, as LLaVA's words `<im_start>` and `<im_end>`.

    Raises:
        ValueError: Unknown names, keys that contradict `type`, or sizes that don't fit.
    """
    projector = _unmarked_projector(in_dim, out_dim, type, pooler, mlp, kwargs)
    if image_marks:
        projector.mark_images()
    return projector


def _unmarked_projector(
    in_dim: int,
    out_dim: int,
    type: str | None,
    pooler: dict[str, Any] | None,
    mlp: dict[str, Any] | None,
    kwargs: dict[str, Any] | None,
) -> Projector:
    if (cls := own_classes("projectors").get(type or "")) is not None:
        own: Projector = cls(in_dim, out_dim, **(kwargs or {}))
        own.config = {"in_dim": in_dim, "out_dim": out_dim, "type": type, "kwargs": kwargs or {}}
        return own
    if kwargs:
        raise ValueError(f"projector.kwargs: are of a projector of one's own, found {sorted(kwargs)}; remove them")
    settings = _settings(MlpSettings, "projector.mlp", mlp or {})
    if type is None and pooler is None and mlp is None:
        type = "attn_pool+mlp2x_gelu"
    if type is not None:
        has_pooler, type_depth = _parse_type(type)
        if pooler is not None and not has_pooler:
            raise ValueError(f"projector: type '{type}' has no pooler, but 'pooler' is given; remove one of the two")
        if mlp is not None and settings.depth != type_depth:
            found = f"has an MLP of depth {type_depth}, but mlp.depth is {settings.depth}"
            raise ValueError(f"projector: type '{type}' {found}; remove one of the two")
        settings = MlpSettings(type_depth)
        if has_pooler and pooler is None:
            pooler = {}
    chosen = None if pooler is None else _settings(PoolerSettings, "projector.pooler", pooler)
    return PooledMlp(in_dim, out_dim, pooler=chosen, mlp=settings)


def _parse_type(name: str) -> tuple[bool, int]:
    """Whether a name of the reference's has a pooler, and the depth of its MLP."""
    if (match := REFERENCE_TYPE.fullmatch(name)) is None:
        raise ValueError(
            f"projector.type: unknown type '{name}'; known are attn_pool+mlp2x_gelu, attn_pool+linear, linear, "
            "mlpNx_gelu (N = 1, 2, ...) and identity"
        )
    return match["pooler"] is not None, 1 if match["linear"] else int(match["depth"] or 0)


def _settings(settings: type[Settings], where: str, given: Mapping[str, Any]) -> Settings:
    """Settings from a YAML's mapping; what isn't given has the default."""
    known = sorted(field.name for field in fields(settings))
    for key, value in given.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            raise ValueError(f"{where}: unknown key '{key}'; known are {known}{hint}")
        if key == "kind":
            if value not in get_args(PoolerKind):
                raise ValueError(f"{where}.kind: must be one of {get_args(PoolerKind)}, found '{value}'")
            continue
        least = 0 if key == "depth" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{where}.{key}: must be a whole number of at least {least}, found {value!r}")
    return settings(**given)
