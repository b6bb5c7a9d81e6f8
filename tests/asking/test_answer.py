"""An answer while it is written: its pieces are its text, its tokens come once, and a stop text ends it anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from composer_path.asking.answer import Answer, Prompt
from composer_path.asking.sampling import Drawn, Sampler, Sampling
from composer_path.records.vocabulary import load_tokenizer

END = 2
PROMPT = Prompt(torch.tensor([1]), (), 1000)


def answer(decode: Callable[[list[int]], str], limit: int = 1000, cleans: bool = False, **settings: Any) -> Answer:
    return Answer(PROMPT, Sampling(limit, **settings), decode, [END], range(3, 259), cleans)


def pieces_of(one: Answer, ids: list[int]) -> tuple[list[str], list[Drawn]]:
    """Write ids until it ends; what was shown after each, and the tokens shown."""
    texts: list[str] = []
    tokens: list[Drawn] = []
    for id in ids:
        one.add(Drawn(id))
        text, shown = one.piece()
        texts.append(text)
        tokens += shown
        if one.finish:
            break
    return texts, tokens


@pytest.fixture(scope="module")
def decode(mistral_tokenizer_path: Any) -> Callable[[list[int]], str]:
    tokenizer = load_tokenizer(mistral_tokenizer_path)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def drawn_ids(draw: random.Random, decode: Callable[[list[int]], str]) -> list[int]:
    """Ids as a wild model writes them: words, single bytes, blanks, special tokens."""
    kinds = [lambda: draw.randrange(3, 259), lambda: draw.randrange(259, 32000), lambda: draw.choice([0, 1, 28705, 13])]
    return [draw.choices(kinds, (2, 5, 1))[0]() for _ in range(draw.randrange(1, 25))] + [END]


def test_pieces_are_the_text_whatever_bytes_and_blanks_come(decode: Callable[[list[int]], str]) -> None:
    draw = random.Random(1)
    for _ in range(150):
        ids = drawn_ids(draw, decode)
        one = answer(decode)
        texts, tokens = pieces_of(one, ids)
        assert "".join(texts) == one.text == decode(ids[:-1]).strip() and one.finish == "stop"
        assert [token.id for token in tokens] == ids[:-1] and one.num_tokens == len(ids)


def test_a_stop_text_ends_an_answer_before_itself_and_is_never_shown(decode: Callable[[list[int]], str]) -> None:
    draw = random.Random(2)
    stopped = 0
    for _ in range(150):
        ids = drawn_ids(draw, decode)
        whole = decode(ids[:-1])
        at = draw.randrange(len(whole) or 1)
        stop = whole[at : at + draw.randrange(1, 6)]
        if not stop or "\ufffd" in stop:
            continue
        one = answer(decode, stop=("never said", stop))
        texts, tokens = pieces_of(one, ids)
        shown = "".join(texts)
        assert shown == one.text and one.finish == "stop" and stop not in shown
        assert [token.id for token in tokens] == ids[: len(tokens)] and tokens == one.tokens()
        if "\ufffd" not in whole:
            assert shown == whole[: whole.index(stop)].strip()
            stopped += 1
    assert stopped > 20


def test_a_tokenizer_that_takes_blanks_out_again_is_waited_for() -> None:
    words = ["do", "n't", "say", "it", ",", "'", "s", "he", ".", "Yes", "!"]

    def cleaned(ids: list[int]) -> str:
        text = " ".join(words[id - 300] for id in ids)
        for mark in (".", "?", "!", ",", "'s"):
            text = text.replace(f" {mark}", mark)
        return text.replace(" ' ", "'").replace(" n't", "n't")

    draw = random.Random(3)
    for _ in range(200):
        ids = [draw.randrange(300, 300 + len(words)) for _ in range(draw.randrange(1, 15))] + [END]
        one = answer(cleaned, cleans=True)
        assert "".join(pieces_of(one, ids)[0]) == one.text == cleaned(ids[:-1]).strip()


def test_an_answer_is_cut_at_its_limit_and_says_so(decode: Callable[[list[int]], str]) -> None:
    one = answer(decode, limit=3)
    pieces_of(one, [1000, 1001, 1002, 1003])
    assert one.finish == "length" and one.num_tokens == 3
    last = answer(decode, limit=2)
    pieces_of(last, [1000, END])
    assert last.finish == "stop" and last.num_tokens == 2 and len(last.drawn) == 1
    roomless = Answer(Prompt(torch.tensor([1]), (), 1), Sampling(5), decode, [END])
    pieces_of(roomless, [1000, 1001])
    assert roomless.finish == "length" and roomless.num_tokens == 1


def test_draws_follow_the_probabilities_of_the_temperature_and_the_likeliest() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, -float("inf")])
    sampler = Sampler(Sampling(temperature=2.0, seed=5))
    counts = torch.bincount(torch.tensor([sampler.choose(scores).id for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts, (scores / 2).softmax(0), rtol=0, atol=0.03)
    few = Sampler(Sampling(temperature=1.0, top_p=0.6, seed=5))
    assert {few.choose(scores).id for _ in range(100)} == {2}  # which alone has 0.67
    more = Sampler(Sampling(temperature=1.0, top_p=0.7, seed=5))
    assert {more.choose(scores).id for _ in range(200)} == {1, 2}
    cold = Sampler(Sampling(temperature=1e-300, seed=5))
    assert {cold.choose(scores).id for _ in range(50)} == {2}
    told = Sampler(Sampling(top_logprobs=4)).choose(scores)
    assert told.id == 2 and told.logprob == pytest.approx(-0.4076, abs=1e-4)
    assert [id for id, _ in told.top] == [2, 1, 0, 3] and told.top[3][1] == -9999.0  # JSON has no infinity


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": ("",)},
        {"top_logprobs": -1},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: must be"):
        Sampling(**settings)
