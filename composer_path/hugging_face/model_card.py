"""The model card, `README.md`: what an exported model is made of, where it comes from, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from composer_path import __version__
from composer_path.hugging_face.image_token import ImageToken
from composer_path.hugging_face.provenance import Provenance
from composer_path.images.pixels import ImagePreparation
from composer_path.models.path_mllm import PathMLLM
from composer_path.records.tokenize import TextPreparation

CARD = "README.md"
_MARK = "<!-- Written by composer-path export, which replaces this file. Take this line out to keep your own. -->"
_PARTS = {"vision_encoder": "Vision encoder", "projector": "Projector", "language_model": "Language model"}

_TEXT = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- composer_path
- pathology
---
{mark}

# {title}

A pathology vision-language model, trained with composer_path. It is for research; it is no medical device, and nothing
it says may be used for a diagnosis.

| | |
|---|---|
{facts}

## Asking it

```
composer-path ask FOLDER --image slide.png "What is shown?"
```

or with transformers, where this folder is `FOLDER`:

```python
import composer_path  # makes transformers know the model
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER)
model = AutoModelForImageTextToText.from_pretrained(FOLDER)
parts = [{{"type": "image"}}, {{"type": "text", "text": "What is shown?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": parts}}], add_generation_prompt=True)
inputs = processor(text=prompt, images=["slide.png"], return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
```
{carried}"""
_CARRIED = """
This folder carries the model's code. Without composer_path, leave out its import and give `trust_remote_code=True` to
each `from_pretrained`, once you have read that code; it needs {packages}.
"""


def model_card(
    model: PathMLLM,
    weights: Mapping[str, Tensor],
    text: TextPreparation,
    images: ImagePreparation,
    token: ImageToken,
    provenance: Provenance,
    packages: Sequence[str] = (),
) -> str:
    """The card's text. It names no place on a disk, no set of data and no record.

    Args:
        model: The architecture.
        weights: As they are written.
        text: How text was prepared.
        images: How images were.
        token: Stands for an image.
        provenance: Where it comes from.
        packages: Of a folder that carries its code: what that needs.
    """
    rows: list[tuple[str, Any]] = []
    if provenance.run is not None:
        rows.append(("Run", provenance.run))
    if provenance.step is not None:
        rows.append(("Steps", f"{provenance.step:,}"))
    if provenance.trained:
        rows.append(("Trained in this run", ", ".join(_PARTS.get(name, name).lower() for name in provenance.trained)))
    config: Any = model.language_model.config
    kinds = {
        "vision_encoder": model.vision_encoder.config["name"],
        "projector": model.projector.config.get("type") or _projector(model.projector.config),
        "language_model": f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}",
    }
    for name, words in _PARTS.items():
        count = sum(value.numel() for key, value in weights.items() if key.startswith(f"{name}."))
        rows.append((words, f"{kinds[name]} ({count:,} parameters)"))
    size = model.vision_encoder.image_size
    kept = f"fit: {images.fit}" + (", 12 bits in 16 scaled" if images.scale_levels else "")
    rows += [
        ("Images", f"{size} x {size} pixels ({kept}), {model.num_image_tokens()} tokens each"),
        ("Image token", f"`{token.text}` ({token.id})"),
        ("Template", f"{text.template.name}, images at: {text.image_position}"),
        ("Longest conversation in training", f"{text.max_seq_len or 'without limit'} tokens"),
        ("Weights", ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in weights.values()}))),
        ("Made with", f"composer_path {__version__}, torch {version('torch')}, transformers {version('transformers')}"),
    ]
    facts = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows)
    carried = _CARRIED.format(packages=", ".join(packages)) if packages else ""
    title = _cell(provenance.run or "A model of composer_path")
    return _TEXT.format(mark=_MARK, title=title, facts=facts, carried=carried)


def is_others_card(path: Path) -> bool:
    """Whether a card is there that no export wrote."""
    return path.is_file() and _MARK not in path.read_text(encoding="utf-8", errors="replace")


def _projector(config: Mapping[str, Any]) -> str:
    pooler, depth = config.get("pooler"), (config.get("mlp") or {}).get("depth")
    pooled = f"{pooler['kind']} pooler with {pooler['num_queries']} queries, " if pooler else ""
    return f"{pooled}MLP of depth {depth}"


def _cell(value: Any) -> str:
    """A value on one line of a table."""
    return " ".join(str(value).replace("|", "\\|").split())
