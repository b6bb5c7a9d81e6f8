"""The token that stands for an image in a folder's vocabulary: added at export, where the tokenizer has none.

A run knows no such token (its placeholders are negative), other programs know nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from composer_path.models.vocabulary_rows import name_of, with_mean_rows
from composer_path.records.image_tags import IMAGE_TAG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers takes seconds to import, and the shape checker resolves annotations at run time

# What it is called: the first that means nothing else to the tokenizer.
NAMES = (IMAGE_TAG, "<|image_pad|>", "<|image|>", "<image_token>", "<|composer_path_image|>")


# LLaVA's words around an image, where a run has vectors (model.projector.image_marks).
MARKS = ("<im_start>", "<im_end>")


@dataclass(frozen=True)
class ImageToken:
    """A token by its text and number."""

    text: str
    id: int


def with_image_token(tokenizer: Tokenizer) -> tuple[Tokenizer, ImageToken]:
    """A tokenizer that has an image token, and which: itself, or a copy with one more.

    A special token of the first of `NAMES` that isn't an ordinary piece is kept, or added with the next free id. The
    same tokenizer gets the same copy again, which nobody may change.

    Raises:
        ValueError: The tokenizer takes no new token.
    """
    return _with_image_token(tokenizer, len(tokenizer.added_tokens_decoder), repr(tokenizer.chat_template))


@lru_cache(maxsize=4)  # the last two tell whether the tokenizer was changed
def _with_image_token(tokenizer: Tokenizer, num_added_tokens: int, own: str) -> tuple[Tokenizer, ImageToken]:
    vocabulary = tokenizer.get_vocab()
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = next((name for name in NAMES if name in special or name not in vocabulary), None)
    if text in special:
        return tokenizer, ImageToken(text, special[text])
    copy = deepcopy(tokenizer)
    if text is not None:
        from transformers import AddedToken

        copy.add_tokens([AddedToken(text, special=True, normalized=False)], special_tokens=True)
    id = None if text is None else copy.get_vocab().get(text)
    if text is None or id is None or id in vocabulary.values():
        rule, fix = "must take one more token, which stands for an image", f"free one of {', '.join(NAMES)} in it"
        raise ValueError(f"the tokenizer {rule}; found that it doesn't; {fix}")
    return copy, ImageToken(text, id)


def with_marks(tokenizer: Tokenizer) -> tuple[Tokenizer, int]:
    """A tokenizer that has LLaVA's words around an image, and the first one's id: itself, or a copy with two more.

    Raises:
        ValueError: The tokenizer has one of them only, has them apart, or takes no new token.
    """
    copy = deepcopy(tokenizer)
    copy.add_tokens(list(MARKS), special_tokens=True)
    first, second = (copy.get_vocab().get(word) for word in MARKS)
    if first is None or second != first + 1:
        rule = f"must take {' and '.join(MARKS)} as two tokens in a row"
        raise ValueError(f"the tokenizer {rule}; found {first} and {second}; leave model.projector.image_marks out")
    return copy, first


def with_image_row(language_model: Any, weights: Mapping[str, Tensor], token: ImageToken) -> dict[str, Tensor]:
    """Weights whose embedding and head have a row for a token; a new row is the mean of the old ones.

    Args:
        language_model: Of a `PathMLLM`; nothing of it changes.
        weights: Of the whole model, under its names.
        token: The last one that needs a row.
    """
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    first = f"language_model.{name_of(language_model, embedding)}.weight"
    missing = token.id + 1 - len(weights[first])
    if missing <= 0:
        return dict(weights)
    names = [first]
    if head is not None:
        names += [f"language_model.{name_of(language_model, head)}.{part}" for part in ("weight", "bias")]
    longer = dict(weights)
    of_embedding = longer[first]
    for name in names:
        if (rows := longer.get(name)) is None:  # a tied head needn't be there, and most have no bias
            continue
        same = name != first and rows.data_ptr() == of_embedding.data_ptr() and rows.shape == of_embedding.shape
        longer[name] = longer[first] if same else with_mean_rows(rows.detach(), missing)
    return longer
