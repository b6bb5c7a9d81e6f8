"""`generation_config.json`: how answers are written, in transformers' words, equal to `composer-path ask`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

from composer_path.records.tokenize import TextPreparation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

GENERATION_CONFIG = "generation_config.json"


def generation_config(
    tokenizer: Tokenizer, text: TextPreparation, image_token_id: int, max_new_tokens: int
) -> dict[str, Any]:
    """The likeliest token at each step, up to the end of an answer; never an image's token."""
    said = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": text.end_ids(tokenizer),
        "pad_token_id": tokenizer.pad_token_id or 0,
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "suppress_tokens": [image_token_id],
        "transformers_version": transformers.__version__,
    }
    return {key: value for key, value in said.items() if value is not None}
