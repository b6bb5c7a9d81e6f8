"""vLLM in an environment of its own answers as `composer-path ask` does, token by token, by each of three routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_model import demo_run, exported, questions
from other_pythons import python_of, run_there

from composer_path.asking.assistant import Assistant
from composer_path.asking.decoding import write_all
from composer_path.asking.sampling import Sampling
from composer_path.records.conversation import Turn
from composer_path.vllm_plugin.prompts import as_ids

MAX_TOKENS = 48
SCRIPT = Path(__file__).with_name("vllm_answers.py")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's model, its questions as each route takes them, and our answers to them."""
    python = python_of("COMPOSER_PATH_VLLM_PYTHON", "vllm")
    work = tmp_path_factory.mktemp("vllm")
    run = demo_run(work / "demo")
    folder = exported(run, work / "exported")
    assistant = Assistant.from_pretrained(folder, device="cpu", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    prompts, ids = [], []
    for question in questions():
        turns = [Turn(("human", "assistant")[place % 2], text) for place, text in enumerate(question.texts)]
        prompts.append(assistant.prompt(turns, [assistant.read_image(file) for file in question.files]))
        ids.append(as_ids(prompts[-1], config["image_token_id"], config["num_image_tokens"]))
    answers = [assistant.begin(prompt, Sampling(MAX_TOKENS)) for prompt in prompts]
    write_all(assistant.decoding(), answers, 8)
    torch.save(assistant.features.embedded(prompts), work / "embeds.pt")
    told = {
        "ids": ids,
        "images": [[str(file) for file in question.files] for question in questions()],
        "messages": [question.messages for question in questions()],
        "embeds": str(work / "embeds.pt"),
        "end_ids": assistant.end_ids(),
        "max_tokens": MAX_TOKENS,
        "max_model_len": assistant.text.max_seq_len or 512,
    }
    (work / "prompts.json").write_text(json.dumps(told), encoding="utf-8")
    return {"python": python, "work": work, "run": run, "folder": folder, "end_ids": set(told["end_ids"])} | {
        "prompts": [
            [id if id >= 0 else config["image_token_id"] for id in prompt.input_ids.tolist()] for prompt in prompts
        ],
        "answers": [[drawn.id for drawn in answer.drawn] for answer in answers],
        "texts": [answer.text for answer in answers],
    }


def of_vllm(asked: dict[str, Any], route: str, folder: Path) -> list[dict[str, list[int]]]:
    out = asked["work"] / f"{route}.json"
    command = [str(SCRIPT), route, str(folder), str(asked["work"] / "prompts.json"), str(out)]
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    run_there(asked["python"], command, asked["work"] / route, **more, VLLM_NO_USAGE_STATS="1")
    found = json.loads(out.read_text(encoding="utf-8"))
    for one in found:
        one["answer"] = [id for id in one["answer"] if id not in asked["end_ids"]]
    return found


def check_answers(asked: dict[str, Any], found: list[dict[str, list[int]]]) -> None:
    assert len(found) >= 24 and len(set(asked["texts"])) >= 10
    assert [one["answer"] for one in found] == asked["answers"]


@pytest.mark.slow
def test_vllm_answers_prompt_embeddings_of_ours_with_the_stock_language_model(asked: dict[str, Any]) -> None:
    language_model = exported(asked["run"], asked["work"] / "language_model", "--as", "language-model")
    check_answers(asked, of_vllm(asked, "embeds", language_model))


@pytest.mark.slow
def test_vllm_answers_ids_and_pictures_by_the_plugin(asked: dict[str, Any]) -> None:
    found = of_vllm(asked, "ids", asked["folder"])
    assert [one["prompt"] for one in found] == asked["prompts"]
    check_answers(asked, found)


@pytest.mark.slow
def test_vllm_answers_messages_by_the_plugin_and_the_folders_chat_template(asked: dict[str, Any]) -> None:
    found = of_vllm(asked, "chat", asked["folder"])
    assert [one["prompt"] for one in found] == asked["prompts"]
    check_answers(asked, found)
