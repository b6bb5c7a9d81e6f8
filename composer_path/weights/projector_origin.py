"""What a projector learned to connect: the vision encoder before it, and the template; stands in its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from composer_path.models.projector import Projector
from composer_path.models.vision_encoder import VisionEncoder
from composer_path.weights.vision_file import weights_hash

HERE = "vision_encoder"


@dataclass(frozen=True)
class ProjectorOrigin:
    """What must be the same where a projector is used again; its own settings and widths are its `config`.

    `encoder` are keywords that rebuild the vision encoder (name, image size, which tokens, normalisation), `weights` is
    the hash of its weights; an image has `num_tokens` tokens before the projector and `num_image_tokens` behind it.
    `template` is the one that it was trained with, and not compared: stage 2 has another.
    """

    encoder: Mapping[str, Any]
    weights: str
    num_tokens: int
    num_image_tokens: int
    template: str | Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """As it stands in a file."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ProjectorOrigin:
        """Read it back; ValueError where it is none."""
        content = json.loads(text)
        if not isinstance(content, dict) or set(content) != {field.name for field in fields(cls)}:
            raise ValueError("found other keys than this version writes")
        if not isinstance(content["encoder"], dict):
            raise ValueError("found an encoder without keywords")
        return cls(**content)

    def differences(self, projector: Projector, encoder: VisionEncoder) -> list[str]:
        """What is otherwise where the projector is to be used, each with both values."""
        here: dict[str, Any] = json.loads(origin_of(projector, encoder, weights="").to_json())
        stored = {f"{HERE}.{key}": value for key, value in self.encoder.items()}
        ours = {f"{HERE}.{key}": value for key, value in here["encoder"].items()}
        for key in ("num_tokens", "num_image_tokens"):
            stored[key], ours[key] = getattr(self, key), here[key]
        found = [
            f"{key}: the file has {stored.get(key)}, the model {ours.get(key)}"
            for key in stored | ours
            if stored.get(key) != ours.get(key)
        ]
        if not found and (weights := weights_hash(encoder)) != self.weights:  # which takes a second to compute
            found = [f"{HERE}: the file has weights of hash {self.weights}, the model {weights}"]
        return found


def origin_of(
    projector: Projector,
    encoder: VisionEncoder,
    template: str | Mapping[str, Any] | None = None,
    *,
    weights: Mapping[str, Tensor] | str | None = None,
) -> ProjectorOrigin:
    """What a projector is trained with.

    Args:
        projector: It.
        encoder: The vision encoder before it.
        template: As a YAML says it.
        weights: Of the encoder, by its own names, or their hash; those that it holds by default.
    """
    num_tokens = encoder.num_tokens(encoder.image_size, encoder.image_size)
    held = weights if isinstance(weights, str) else weights_hash(encoder, weights)
    return ProjectorOrigin(encoder.config, held, num_tokens, projector.num_image_tokens(num_tokens), template)
