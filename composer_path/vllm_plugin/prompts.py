"""Prompts for vLLM that are ours to the last id: as embeddings for a stock language model, or as ids for the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from composer_path.asking.answer import Prompt
from composer_path.asking.assistant import Assistant


@torch.inference_mode()
def embedded(assistant: Assistant, prompts: Sequence[Prompt]) -> list[Float[Tensor, "tokens hidden"]]:
    """What the language model reads of each prompt: the words' embeddings, with the images' vectors between them.

    For `{"prompt_embeds": ...}` of a vLLM that was started with `enable_prompt_embeds` on the folder of
    `composer-path export --as language-model`. Each image is encoded once.

    Args:
        assistant: Of the exported folder.
        prompts: From `assistant.prompt`.
    """
    vectors = iter(assistant.features.of([image for prompt in prompts for image in prompt.images]))
    device = next(assistant.model.language_model.parameters()).device
    rows = []
    for prompt in prompts:
        ids = prompt.input_ids.to(device)
        images = [next(vectors) for _ in prompt.images]
        width = assistant.model.language_model.get_input_embeddings().weight.shape[1]
        stacked = torch.stack(images) if images else torch.zeros((0, 1, width), device=device)
        rows.append(assistant.model.embed_tokens(ids, stacked, (ids < 0).nonzero()[:, 0]).cpu())
    return rows


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
