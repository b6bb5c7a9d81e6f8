"""A prompt of ours for a vLLM with the plugin, to the last id: what its own chat template makes of messages aside."""

from __future__ import annotations

from composer_path.asking.answer import Prompt


def as_ids(prompt: Prompt, image_token_id: int, num_image_tokens: int) -> list[int]:
    """A prompt's ids as vLLM takes them beside pictures: one image token for each, as `prompt_token_ids`.

    Args:
        prompt: From `Assistant.prompt`.
        image_token_id: As the folder's `config.json` says.
        num_image_tokens: As it says, too.
    """
    ids: list[int] = []
    run = 0
    for id in prompt.input_ids.tolist():
        run = run + 1 if id < 0 else 0
        if id >= 0:
            ids.append(id)
        elif run % num_image_tokens == 1 % num_image_tokens:
            ids.append(image_token_id)
    return ids
