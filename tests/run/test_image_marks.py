"""Marks around images (LLaVA's `mm_use_im_start_end`) in both stages: trained, resumed, read back, exported, asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launched_ranks import launch
from tiny_run import BARE, Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from composer_path.asking.assistant import Assistant
from composer_path.config.reading import plain
from composer_path.planning.measured_lengths import image_tokens_of
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.image_tags import IMAGE_TAG

MARKS = "model.projector.image_marks=true"
SHORT = [MARKS, *BARE, "trainer.max_duration=2ba", "trainer.save_interval=1ba", "callbacks.save_weights.interval=2ba"]
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps of stage 1, undisturbed."""
    root = tmp_path_factory.mktemp("marks")
    config = load_tiny_config("pretrain", convert_shards(root / "shards"), root / "whole", SHORT)
    trainer, witness = run(config)
    return {"root": root, "config": config, "weights": weights_of(trainer), "gradients": witness.gradients}


def test_stage_1_moves_the_two_marks_and_no_other_word(stage_1: dict[str, Any]) -> None:
    weights = stage_1["weights"]
    mean = weights[EMBEDDING].float().mean(0)  # as they began
    moved = (weights["projector.marks"] - mean).abs().amax(1)
    assert (moved > 1e-4).all()
    assert stage_1["gradients"]["projector.marks"].abs().amax(1).gt(0).all()
    assert all(name.startswith("projector.") for name in stage_1["gradients"])
    assert image_tokens_of(plain(stage_1["config"])["model"]) == 4 + 2  # what balance, plan and --check count with
    file = torch.load(stage_1["root"] / "whole" / "pretrain" / "mm_projector.bin", weights_only=True)
    assert torch.equal(file["model.embed_tokens.weight"], weights["projector.marks"])


def test_a_resumed_stage_1_has_the_same_marks_bit_for_bit(stage_1: dict[str, Any]) -> None:
    root = stage_1["root"]
    resumed = [*SHORT, "trainer.autoresume=true"]
    with pytest.raises(Interrupted):
        run(load_tiny_config("pretrain", root / "shards", root / "cut", resumed), Witness(stop_after=1))
    trainer, witness = run(load_tiny_config("pretrain", root / "shards", root / "cut", resumed))
    assert list(witness.losses) == [1]
    for name, value in weights_of(trainer).items():
        assert torch.equal(value, stage_1["weights"][name]), name


@pytest.mark.parametrize("file", ["projector.safetensors", "mm_projector.bin"])
def test_stage_2_reads_the_marks_trains_them_and_what_it_leaves_asks_with_the_ids_of_training(
    stage_1: dict[str, Any], file: str, repo_root: Path
) -> None:
    root = stage_1["root"]
    start = f"model.projector.weights={root}/whole/pretrain/{file}"
    out = root / file.partition(".")[0]
    config = load_tiny_config(
        "finetune", root / "shards", out, [*SHORT, start, "trainer.max_duration=1ba", "scheduler.t_warmup=0dur"]
    )
    trainer, witness = run(config)
    assert witness.gradients["projector.marks"].abs().amax(1).gt(0).all()
    began, weights = stage_1["weights"]["projector.marks"], weights_of(trainer)
    assert 0 < (weights["projector.marks"] - began).abs().max() < 5e-3  # one step of Adam at 2e-3 from there
    assistant = Assistant.from_pretrained(out / "finetune" / "model", device="cpu")
    assert torch.equal(assistant.model.projector.marks, weights["projector.marks"])
    assert assistant.model.num_image_tokens() == assistant.text.num_image_tokens == 4 + 2
    picture = next((repo_root / "test_data" / "imgs").iterdir())
    asked = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What is shown?"}]
    processor = AutoProcessor.from_pretrained(out / "finetune" / "model")
    messages = [{"role": "user", "content": asked}]
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    text = trainer.state.train_dataloader.dataset.text  # which training prepared samples with
    question = Conversation(turns=(Turn("human", f"{IMAGE_TAG}\nWhat is shown?"),), images=("",))
    expected = text.prompt(question, assistant.tokenizer)
    assert int((expected < 0).sum()) == 6
    assert found["input_ids"][0].tolist() == expected.where(expected >= 0, assistant.model.image_token_id).tolist()
    stock = AutoModelForImageTextToText.from_pretrained(out / "finetune" / "model").eval()
    tokens = stock.generate(**found, max_new_tokens=4, do_sample=False)[0, len(expected) :]
    pixels = assistant.read_image(picture)[None]
    assert tokens.tolist() == assistant.model.generate(expected, pixels, max_new_tokens=4).tolist()


@pytest.mark.slow
def test_two_ranks_learn_the_marks_that_one_learns(stage_1: dict[str, Any], tmp_path: Path) -> None:
    launched = launch(
        2,
        "two_ranks.py",
        [{"name": "two", "stage": "pretrain", "overrides": SHORT}],
        stage_1["root"] / "shards",
        tmp_path,
    )
    assert launched.returncode == 0, launched.output[-4000:]
    first, second = (notes["weights"]["projector.marks"] for notes in launched.notes["two"])
    assert torch.equal(first, second)
    assert (first - stage_1["weights"]["projector.marks"]).abs().max() < 1e-6
