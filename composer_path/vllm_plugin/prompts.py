"""Prompts for vLLM that are ours to the last id: as embeddings for a stock language model, or as ids for the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer_path.asking.answer import Prompt


def as_ids(prompt: Prompt, image_token_id: int, num_image_tokens: int, pictures: Sequence[Any]) -> dict[str, Any]:
    """A prompt for a vLLM with the plugin, on the exported folder: one image token stands for each picture.

    Args:
        prompt: From `assistant.prompt`.
        image_token_id: As the folder's configuration says.
        num_image_tokens: As it says, too.
        pictures: Those of the prompt, as Pillow has them.
    """
    ids, run = [], 0
    for id in prompt.input_ids.tolist():
        run = run + 1 if id < 0 else 0
        if id >= 0 or run % num_image_tokens == 1 or num_image_tokens == 1:
            ids.append(image_token_id if id < 0 else id)
    return (
        {"prompt_token_ids": ids, "multi_modal_data": {"image": list(pictures)}}
        if pictures
        else {"prompt_token_ids": ids}
    )
