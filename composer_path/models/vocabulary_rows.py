"""The rows of a language model's embedding and head: which of them are one tensor, and adding some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from composer_path.models.language_types import inputs_scale


def tied_names(language_model: PreTrainedModel) -> tuple[str, str] | None:
    """The names of head and embedding where they are one tensor."""
    head: Any = language_model.get_output_embeddings()
    embedding: Any = language_model.get_input_embeddings()
    if head is None or not language_model.config.tie_word_embeddings:
        return None
    return f"{name_of(language_model, head)}.weight", f"{name_of(language_model, embedding)}.weight"


def name_of(language_model: PreTrainedModel, module: nn.Module) -> str:
    """What one of its modules is called."""
    return next(name for name, one in language_model.named_modules() if one is module)


def add_rows(language_model: PreTrainedModel, rows: int) -> int:
    """Let embedding and head have so many rows at least; a new one is the mean of the old ones.

    Returns:
        How many were added.
    """
    embedding: Any = language_model.get_input_embeddings()
    head: Any = language_model.get_output_embeddings()
    added = rows - embedding.num_embeddings
    if added <= 0:
        return 0
    tied = head.weight is embedding.weight
    embedding.weight = _longer(embedding.weight, added)
    head.weight = embedding.weight if tied else _longer(head.weight, added)
    if getattr(head, "bias", None) is not None:
        head.bias = _longer(head.bias, added)
    embedding.num_embeddings = head.out_features = rows
    language_model.config.vocab_size = rows
    for module in language_model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module, "vocab_size"):
            module.vocab_size = rows  # type: ignore[assignment]
    return added


def mean_word(language_model: PreTrainedModel, copies: int) -> Tensor:
    """The mean of all words, so many times, as the decoder gets them; in fp32."""
    embedding: Any = language_model.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0)) * inputs_scale(language_model.config)
    return (embedding.weight.detach().mean(0, dtype=torch.float32) * scale).repeat(copies, 1)


def _longer(weight: nn.Parameter, added: int) -> nn.Parameter:
    """A parameter with rows added to it."""
    return nn.Parameter(with_mean_rows(weight.detach(), added), requires_grad=weight.requires_grad)


def with_mean_rows(rows: Tensor, added: int) -> Tensor:
    """Rows, and so many more, each their mean, computed in fp32."""
    mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(added, *rows.shape[1:])])
