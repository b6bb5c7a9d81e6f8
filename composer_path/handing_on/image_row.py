"""A real token where an image stands: in the tokenizer, and a row of its own in embedding and head."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_path.models.vocabulary_rows import with_mean_rows
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.run.export import Trained

SECOND_NAME = "<|image_pad|>"  # where the vocabulary means something else by the tag


@dataclass(frozen=True)
class ImageToken:
    """The token, and tokenizer and weights that have it; `rows` is how many ids the embedding then knows."""

    text: str
    id: int
    rows: int
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, Tensor]


def with_image_token(found: Trained, weights: dict[str, Tensor]) -> ImageToken:
    """The tokenizer's own image token, or the next free id; the live model and tokenizer stay as they are."""
    tokenizer: Any = found.tokenizer
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocabulary = tokenizer.get_vocab()
    text = next((name for name in (IMAGE_TAG, SECOND_NAME) if name in special or name not in vocabulary), IMAGE_TAG)
    if text not in special:
        tokenizer = deepcopy(tokenizer)
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False)], special_tokens=True)
    id: int = tokenizer.convert_tokens_to_ids(text)
    rows = max(found.model.num_embeddings(), id + 1)
    return ImageToken(text, id, rows, tokenizer, _with_rows(found, weights, rows))


def _with_rows(found: Trained, weights: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Weights whose embedding and head have so many rows; a new one is the mean of the old ones."""
    language_model = found.model.language_model
    names = {id(module): name for name, module in language_model.named_modules()}
    grown = dict(weights)
    for module in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        for kind in ("weight", "bias"):
            name = f"language_model.{names[id(module)]}.{kind}"
            if name in grown and (added := rows - len(grown[name])) > 0:
                grown[name] = with_mean_rows(grown[name], added)
    return grown
