"""Answers written together are those that transformers writes one by one, whoever comes, goes and stands beside."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_language_models import CASES, SIZES, WINDOW, tiny
from torch import nn
from transformers import DynamicCache

from composer_path.asking.answer import Answer, Prompt
from composer_path.asking.decoding import Decoding, rows_at_once, write_all
from composer_path.asking.image_features import ImageFeatures
from composer_path.asking.sampling import Sampling
from composer_path.models.language_model import untrained_language_model
from composer_path.models.projector import untrained_projector
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR
from composer_path.models.vision_encoder import untrained_vision_encoder
from composer_path.weights.model_folder import PathMLLM

LENGTHS = (20, 3, 13, 7, 2)  # two are longer than the window
IMAGE_TOKENS = 2
NEW = 9


def numbers(ids: list[int]) -> str:
    """Stands in for a tokenizer."""
    return " ".join(map(str, ids))


@functools.cache
def eyes() -> tuple[Any, Any]:
    keywords: dict[str, Any] = {"kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2}, "image_size": 32}
    encoder = untrained_vision_encoder("timm/vit_tiny_patch16_224", **keywords)
    pooler = {"dim": 16, "num_queries": IMAGE_TOKENS, "num_heads": 2}
    projector: dict[str, Any] = {"in_dim": 16, "out_dim": SIZES["hidden_size"], "pooler": pooler}
    return encoder, untrained_projector(**projector, mlp={"depth": 1})


def model_of(name: str, kind: str) -> PathMLLM:
    torch.manual_seed(5)
    try:
        language_model = untrained_language_model(tiny(name, kind))
    except ValueError as error:
        if TRANSFORMERS_MAJOR < 5 and ("needs transformers 5" in str(error) or "does not go through" in str(error)):
            pytest.skip("before transformers 5 it is refused by name")
        raise
    with torch.no_grad():  # random scores must not be nearly equal
        for parameter in language_model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return PathMLLM(*eyes(), language_model).eval()


def prompts() -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    images = [torch.randint(0, 255, (3, 32, 32), generator=draw, dtype=torch.uint8) for _ in range(2)]
    made = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(3, SIZES["vocab_size"], (length,), generator=draw)
        shown = images[: index % 3] if length > 2 else []
        ids = torch.cat([torch.full((IMAGE_TOKENS * len(shown),), -200), ids])
        made.append(Prompt(ids, tuple(shown), 30))
    return made


def alone(model: PathMLLM, prompt: Prompt, end: int | None) -> list[int]:
    pixels = torch.stack(prompt.images) if prompt.images else None
    ids = model.generate(prompt.input_ids, pixels, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0).tolist()
    return ids[: ids.index(end)] if end in ids else ids


def written(answers: list[Answer]) -> list[list[int]]:
    return [[drawn.id for drawn in answer.drawn] for answer in answers]


def answers_to(asked: list[Prompt], end: int, **settings: Any) -> list[Answer]:
    return [Answer(prompt, Sampling(NEW, **settings), numbers, [end]) for prompt in asked]


QUICK = {
    ("llama", "plain"),
    ("qwen2", "windows"),
    ("gemma2", "strong capping"),
    ("gpt_oss", "windows"),
    ("gpt2", "plain"),
}
CASES_BY_TIME = [one if one in QUICK else pytest.param(*one, marks=pytest.mark.slow) for one in CASES]


@pytest.mark.parametrize(("name", "kind"), CASES_BY_TIME)
def test_each_language_model_writes_together_what_it_writes_alone(name: str, kind: str) -> None:
    model, asked = model_of(name, kind), prompts()
    free = [alone(model, prompt, None) for prompt in asked]
    end = free[0][4]  # ends the first answer early, and others somewhere
    expected = [alone(model, prompt, end) for prompt in asked]
    assert len({len(ids) for ids in expected}) > 1
    answers = answers_to(asked, end)
    write_all(Decoding(model, ImageFeatures(model)), answers, batch_size=3)
    assert written(answers) == expected


@pytest.fixture(scope="module")
def llama() -> PathMLLM:
    return model_of("llama", "plain")


def test_answers_may_begin_and_be_dropped_at_any_step(llama: PathMLLM) -> None:
    asked = prompts()
    expected = [alone(llama, prompt, None) for prompt in asked]
    answers, decoding = answers_to(asked, -1), Decoding(llama, ImageFeatures(llama))
    for answer in reversed(answers):
        decoding.begin([answer])
        decoding.step()
        decoding.step()
    dropped = answers[2]
    decoding.drop(dropped)
    decoding.drop(dropped)  # as one that isn't there any more
    while decoding.answers:
        decoding.step()
    assert written(answers[:2] + answers[3:]) == expected[:2] + expected[3:]
    assert written([dropped])[0] == expected[2][: len(dropped.drawn)] and dropped.finish is None


def test_a_seed_gives_the_same_answer_alone_and_beside_others_and_another_seed_another(llama: PathMLLM) -> None:
    asked = prompts()
    settings: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9}

    def drawn(seeds: list[int], batch_size: int) -> list[list[int]]:
        answers = [
            answers_to([prompt], -1, seed=seed, **settings)[0] for prompt, seed in zip(asked, seeds, strict=True)
        ]
        write_all(Decoding(llama, ImageFeatures(llama)), answers, batch_size)
        return written(answers)

    together = drawn([1, 2, 3, 4, 5], 5)
    assert together == drawn([1, 2, 3, 4, 5], 1)
    others = drawn([1, 2, 8, 9, 10], 5)
    assert others[:2] == together[:2] and others[2:] != together[2:]


def test_each_image_is_encoded_once_however_often_it_is_asked_about(llama: PathMLLM) -> None:
    features = ImageFeatures(llama)
    for _ in range(2):
        write_all(Decoding(llama, features), answers_to(prompts(), -1), 2)
    assert features.num_encoded == 2
    features.forget()
    features.of(prompts()[2].images)
    assert features.num_encoded == 4


def test_as_many_features_are_kept_as_are_asked_for_and_the_latest(llama: PathMLLM) -> None:
    features = ImageFeatures(llama, kept=1)
    first, second = prompts()[2].images
    assert len(features.of([first, second, first])) == 3 and features.num_encoded == 2
    features.of([second, first])
    assert features.num_encoded == 3  # the first is what was asked for last
    features.of([second])
    assert features.num_encoded == 4


def test_an_image_id_is_never_written(llama: PathMLLM) -> None:
    asked = prompts()[:1]
    first = alone(llama, asked[0], None)[0]
    answers = answers_to(asked, -1)
    write_all(Decoding(llama, ImageFeatures(llama), never=[first]), answers, 1)
    assert first not in written(answers)[0]


def test_told_probabilities_are_those_of_the_training_forward(llama: PathMLLM) -> None:
    asked = prompts()
    answers = answers_to(asked, -1, top_logprobs=3, temperature=2.0, seed=4)
    write_all(Decoding(llama, ImageFeatures(llama)), answers, 3)
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.cat([prompt.input_ids, torch.tensor([one.id for one in answer.drawn])])
        logits = llama(
            input_ids=ids,
            position_ids=torch.arange(len(ids)),
            cu_seq_lens=torch.tensor([0, len(ids)], dtype=torch.int32),
            max_seq_len=len(ids),
            pixel_values=torch.stack(prompt.images) if prompt.images else torch.zeros((0, 3, 32, 32)),
            image_index=(ids < 0).nonzero()[:, 0],
        )
        logprobs = logits.double().log_softmax(1)[len(prompt.input_ids) - 1 : -1]
        told = torch.tensor([one.logprob for one in answer.drawn], dtype=torch.float64)
        taken = logprobs.gather(1, ids[len(prompt.input_ids) :, None])[:, 0]
        torch.testing.assert_close(told, taken, rtol=0, atol=1e-4)
        assert [[id for id, _ in one.top] for one in answer.drawn] == logprobs.topk(3).indices.tolist()


def test_rows_of_a_rope_that_depends_on_the_longest_stand_alone() -> None:
    model = model_of("llama", "plain")
    assert rows_at_once(model, 8, None) == 8
    model.language_model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model.language_model.config.rope_scaling = model.language_model.config.rope_parameters
    assert rows_at_once(model, 8, 64) == 8 and rows_at_once(model, 8, 65) == 1 and rows_at_once(model, 8, None) == 1


def test_a_cache_without_a_configuration_keeps_all_tokens_of_windowed_layers_too() -> None:
    """Of transformers: rows are cut out of it and joined, which a window that is cut to its end forbids."""
    model = model_of("mistral", "a window").language_model
    cache = DynamicCache()
    ids = torch.arange(3, 3 + 3 * WINDOW)[None]
    found = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
    assert [layer[0].shape[2] for layer in found] == [3 * WINDOW] * 2
