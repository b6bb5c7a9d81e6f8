from __future__ import annotations

import torch

from composer_path.asking.answer import Prompt
from composer_path.vllm_plugin.prompts import as_ids


def test_one_image_token_stands_for_each_image_and_neighbours_stay_two() -> None:
    ids = torch.tensor([1, -200, -200, -200, -200, 7, -200, -200, 8])
    assert as_ids(Prompt(ids, (), 1), 99, 2) == [1, 99, 99, 7, 99, 8]
    assert as_ids(Prompt(ids[:2], (), 1), 99, 1) == [1, 99]
