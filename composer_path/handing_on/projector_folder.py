"""`--as projector`: the projector alone, in our file and, where it can be said there, in the reference's."""

from __future__ import annotations

from pathlib import Path

from composer_path.handing_on.trained_model import whole_weights
from composer_path.run.export import Trained, origin_of_trained, write_projector
from composer_path.run.published import publish


def write_projector_folder(folder: Path, found: Trained, dtype: str | None = None) -> None:
    """Write `projector.safetensors`, which names the encoder it belongs to, `mm_projector.bin` and a configuration."""
    weights = whole_weights(found, dtype)
    origin = origin_of_trained(found, weights)
    publish(folder, "projector", lambda new: write_projector(new, found.model, weights, origin))
