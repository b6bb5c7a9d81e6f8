"""`--as onnx`: vision encoder and projector as one graph, from pixels to vectors in the language model's word space."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from composer_path import __version__
from composer_path.handing_on.trained_model import whole_weights
from composer_path.models.projector import Projector, untrained_projector
from composer_path.models.vision_encoder import VisionEncoder, untrained_vision_encoder
from composer_path.run.export import Trained, part_of
from composer_path.run.published import publish
from composer_path.weights.model_folder import PathMLLM

FILE = "vision_projector.onnx"
OPSET = 18
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "pixel_values", "image_embeds"
CLOSE = 1e-4  # relative; measured 1e-6 on a small ViT, and operators of both are in fp32


class ImageEmbedder(nn.Module):
    """What the graph is made of: `PathMLLM.embed_images` for images that are normalised already."""

    def __init__(self, vision_encoder: VisionEncoder, projector: Projector) -> None:
        super().__init__()
        self.vision_encoder, self.projector = vision_encoder, projector

    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images tokens hidden"]:
        """1. Encode. 2. Project."""
        return self.projector(self.vision_encoder(pixel_values))


def write_onnx(folder: Path, found: Trained, dtype: str | None = None) -> None:
    """Write the graph, which is checked with onnxruntime against the model before anything is published.

    Raises:
        ValueError: A package is missing, another dtype is asked for, or the graph gives other numbers.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(f"--as onnx: needs {', '.join(missing)}; pip install {' '.join(missing)}")
    if dtype == "bf16":
        raise ValueError("--dtype: a graph is written in fp32, found bf16; leave it out")
    weights, model = whole_weights(found, "fp32"), found.model
    embedder = plain_embedder(model, weights)
    publish(folder, "onnx", lambda new: _export(new / FILE, embedder, found))


def plain_embedder(model: PathMLLM, weights: dict[str, Tensor]) -> ImageEmbedder:
    """Vision encoder and projector in fp32 with these weights, without adapters."""
    vision = untrained_vision_encoder(**model.vision_encoder.config)
    projector = untrained_projector(**model.projector.config)
    vision.load_state_dict(part_of(weights, "vision_encoder"))
    projector.load_state_dict(part_of(weights, "projector"))
    return ImageEmbedder(vision, projector).eval()


def _export(file: Path, embedder: ImageEmbedder, found: Trained) -> None:
    import onnx

    size = embedder.vision_encoder.image_size
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(17))
    with torch.no_grad():
        program: Any = torch.onnx.export(
            embedder,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("images", min=1, max=4096)},),
            verbose=False,
        )
    program.save(str(file), external_data=_too_large(embedder))
    graph = onnx.load(str(file), load_external_data=False)
    for key, value in _facts(found).items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(graph, str(file))
    check_graph(file, embedder)


def _too_large(module: nn.Module) -> bool:
    """Whether a graph with these weights passes what one file can hold (2 GB); they then lie beside it."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()) > 1_900_000_000


def _facts(found: Trained) -> dict[str, str]:
    """What whoever runs the graph must know: how images are prepared, and where the vectors go."""
    encoder, images = found.model.vision_encoder, found.images
    facts: dict[str, Any] = {
        "image_size": encoder.image_size,
        "image_mean": encoder.mean,
        "image_std": encoder.std,
        "fit": images.fit,
        "pad_color": images.pad_color,
        "scale_levels": images.scale_levels,
        "num_image_tokens": found.model.num_image_tokens(),
        "vision_encoder": encoder.config["name"],
        "version": __version__,
        "opset": OPSET,
    }
    return {f"composer_path.{key}": json.dumps(value) for key, value in facts.items()}


def check_graph(file: Path, embedder: ImageEmbedder) -> float:
    """The largest difference, relative to the largest value, of the graph and the model for one image and for three.

    Raises:
        ValueError: It is more than rounding.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    size, worst = embedder.vision_encoder.image_size, 0.0
    for count in (1, 3):
        images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            ours = embedder(images).numpy()
        try:
            theirs = session.run([OUTPUT], {INPUT: images.numpy()})[0]
        except Exception as error:  # onnxruntime's own, such as of a batch size that became fixed
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"--as onnx: the graph must take {count} images, found: {why}; it isn't written") from None
        if theirs.shape != ours.shape:
            raise ValueError(f"--as onnx: the graph gives {theirs.shape}, the model {ours.shape}; it isn't written")
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(ours).max()))
    if not worst < CLOSE:
        raise ValueError(f"--as onnx: the graph's numbers differ by {worst:.1e} of the largest; it isn't written")
    return worst
