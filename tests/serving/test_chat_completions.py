"""OpenAI's client gets the answers that `ask` gives: text, images, turns, streams, probabilities, many at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="serving needs the extra 'serve'")
openai = pytest.importorskip("openai")

from served_model import NAME, OTHER_TILE, TILE, Served, served, user  # noqa: E402
from tiny_model import tiny_model_folder  # noqa: E402

from composer_path.asking.assistant import Assistant  # noqa: E402
from composer_path.records.conversation import Turn  # noqa: E402

QUESTION = "Which stain was used here, H&E or IHC?"
NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model")
    with served(Assistant.from_pretrained(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def client(model: Served) -> Any:
    return model.client()


def ask(client: Any, *messages: dict[str, Any], **settings: Any) -> Any:
    return client.chat.completions.create(model=NAME, messages=list(messages), **{"max_tokens": NEW} | settings)


def expected(model: Served, turns: list[tuple[str, str]], *tiles: Any, **settings: Any) -> str:
    images = [model.assistant.read_image(tile) for tile in tiles]
    return model.assistant.answer(turns, images, **{"max_new_tokens": NEW} | settings)


def test_the_one_model_is_listed_and_described(client: Any, model: Served) -> None:
    (card,) = client.models.list().data
    assert card.id == NAME == client.models.retrieve(NAME).id
    assert card.composer_path["takes_question"] is True
    with pytest.raises(openai.NotFoundError, match="no other model"):
        client.models.retrieve("other")


def test_a_text_an_image_and_several_images_are_answered_as_ask_answers_them(client: Any, model: Served) -> None:
    for tiles in ((), (TILE,), (TILE, OTHER_TILE), (OTHER_TILE, TILE)):
        said = ask(client, user(QUESTION, *tiles))
        assert said.choices[0].message.content == expected(model, [("human", QUESTION)], *tiles)
        images = [model.assistant.read_image(tile) for tile in tiles]
        prompt = model.assistant.prompt([Turn("human", QUESTION)], images)
        assert said.usage.prompt_tokens == len(prompt.input_ids) and said.usage.completion_tokens == NEW
        assert said.choices[0].finish_reason == "length"


def test_earlier_turns_the_system_message_and_where_images_stand_are_part_of_what_is_asked(
    client: Any, model: Served
) -> None:
    said = ask(
        client,
        {"role": "system", "content": "Answer in one word."},
        user("Look.", TILE),
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}, *user(None, OTHER_TILE)["content"]]},
    )
    turns = [("human", "<image>\nLook."), ("assistant", "I see."), ("human", f"{QUESTION}\n<image>")]
    assert said.choices[0].message.content == expected(model, turns, TILE, OTHER_TILE, system="Answer in one word.")


def test_a_stream_is_the_answer_in_pieces(client: Any, model: Served) -> None:
    whole = ask(client, user(QUESTION, TILE))
    chunks = list(ask(client, user(QUESTION, TILE), stream=True, stream_options={"include_usage": True}))
    *pieces, usage = chunks
    assert [piece.choices[0].delta.role for piece in pieces[:2]] == ["assistant", None]
    texts = [piece.choices[0].delta.content or "" for piece in pieces]
    assert "".join(texts) == whole.choices[0].message.content and sum(map(bool, texts)) > 3
    assert [piece.choices[0].finish_reason for piece in pieces[-2:]] == [None, "length"]
    assert usage.choices == [] and usage.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_told_probabilities_belong_to_the_answer(client: Any, model: Served) -> None:
    said = ask(client, user(QUESTION, TILE), logprobs=True, top_logprobs=3).choices[0]
    tokens = said.logprobs.content
    assert "".join(token.token for token in tokens).strip() == said.message.content and len(tokens) == NEW
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) for token in tokens)
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.bytes is None or bytes(token.bytes).decode() == token.token for token in tokens)
    chunks = list(ask(client, user(QUESTION, TILE), logprobs=True, top_logprobs=3, stream=True))
    told = [one for chunk in chunks if (found := chunk.choices[0].logprobs) for one in found.content]
    assert [one.token for one in told] == [one.token for one in tokens]
    torch.testing.assert_close([one.logprob for one in told], [one.logprob for one in tokens], rtol=0, atol=1e-5)
    plain = ask(client, user(QUESTION, TILE), logprobs=True).choices[0].logprobs.content
    assert [one.token for one in plain] == [one.token for one in tokens] and plain[0].top_logprobs == []


def test_a_stop_text_ends_the_answer_before_itself(client: Any) -> None:
    whole = ask(client, user(QUESTION, TILE)).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    for stream in (False, True):
        said = ask(client, user(QUESTION, TILE), stop=["never said", stop], stream=stream, logprobs=True)
        if stream:
            choices = [chunk.choices[0] for chunk in said]
            text = "".join(choice.delta.content or "" for choice in choices)
            tokens = [one.token for choice in choices if choice.logprobs for one in choice.logprobs.content]
            finish = choices[-1].finish_reason
        else:
            text, finish = said.choices[0].message.content, said.choices[0].finish_reason
            tokens = [one.token for one in said.choices[0].logprobs.content]
        assert text == whole[: whole.index(stop)].strip() and finish == "stop"
        assert "".join(tokens).strip().startswith(text)


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(client: Any) -> None:
    def drawn(seed: int | None) -> str:
        return str(ask(client, user(QUESTION), temperature=2.0, top_p=0.95, seed=seed).choices[0].message.content)

    assert drawn(7) == drawn(7)
    assert len({drawn(7), drawn(8), drawn(None), drawn(None)}) == 4


def test_eight_at_once_get_the_answers_of_one_after_the_other(client: Any, model: Served) -> None:
    asked = [user(f"{QUESTION} {'Really? ' * number}", *([TILE, OTHER_TILE][: number % 3])) for number in range(8)]
    settings = [{"seed": n, "temperature": 1.5} if n % 4 == 3 else {"max_tokens": 5 + 3 * n} for n in range(8)]
    before = [ask(client, one, **more).choices[0].message.content for one, more in zip(asked, settings, strict=True)]
    most = 0

    def at_once(number: int) -> str:
        nonlocal most
        said = ""
        for chunk in ask(client, asked[number], stream=True, **settings[number]):
            most = max(most, model.engine.num_running)
            said += chunk.choices[0].delta.content or ""
        return said

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(at_once, range(8))) == before
    assert most > 1


def test_a_model_that_takes_no_question_captions(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_captioner", "plain")
    with served(Assistant.from_pretrained(folder)) as running:
        client = running.client()
        said = ask(client, user(None, TILE)).choices[0].message.content
        images = [running.assistant.read_image(TILE)]
        assert said == running.assistant.caption(images, max_new_tokens=NEW)
        assert client.models.list().data[0].composer_path["takes_question"] is False
        with pytest.raises(openai.BadRequestError, match="takes no question"):
            ask(client, user(QUESTION, TILE))
        with pytest.raises(openai.BadRequestError, match="a caption needs an image"):
            ask(client, {"role": "user", "content": ""})
