"""Made-up sets of the lengths of both stages, as shards of finished squares, so that no decoding is measured."""

from __future__ import annotations

import json
import random
from pathlib import Path

import sentencepiece

from benchmarks.instruction_set import IMAGES, REPOSITORY, demo_words, sentence
from benchmarks.proportions import IMAGE_TOKENS, draw_caption, draw_of_mixture
from composer_path.planning.plan import SampleSize

TOKENIZER = REPOSITORY / "test_data" / "tokenizer"


def write_stage_set(
    folder: Path, stage: str, num_records: int, image_size: int, shorter: int = 1
) -> tuple[Path, SampleSize]:
    """Shards for `pretrain` (captions) or `finetune` (the mixture), and the mean sample; an existing set is taken.

    Args:
        folder: To write to.
        stage: Which lengths.
        num_records: Of the set.
        image_size: Side of the squares in pixels.
        shorter: Divides the texts' lengths, for a quick run.
    """
    from composer_path.conversion.convert import convert

    shards, sizes = folder / stage, folder / f"{stage}.sizes.json"
    if sizes.exists():
        return shards, SampleSize(**json.loads(sizes.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    words, draw = demo_words(), random.Random(f"gpu {stage}")
    tiles = sorted(path.name for path in IMAGES.glob("*.jpg"))
    records, tokens, answers = [], 0, 0
    for index in range(num_records):
        text, answer, num_images = (draw_caption if stage == "pretrain" else draw_of_mixture)(draw)
        text, answer = max(4, text // shorter), max(2, answer // shorter)
        tokens, answers = tokens + text + num_images * IMAGE_TOKENS, answers + answer
        tag = "<image>\n" * num_images
        question = "" if stage == "pretrain" else sentence(words, text - answer - 8, pieces, draw)
        turns = [
            {"from": "human", "value": f"{tag}{question}"},
            {"from": "assistant", "value": sentence(words, answer, pieces, draw)},
        ]
        images = {"image": draw.choice(tiles)} if num_images else {}
        records.append({"id": f"made-{index}", "conversations": turns} | images)
    data = folder / f"{stage}.json"
    data.write_text(json.dumps(records), encoding="utf-8")
    convert(data, IMAGES, shards, resized={"image_size": image_size, "fit": "pad", "pad_color": (123, 116, 103)})
    mean = SampleSize(tokens // num_records, min(answers, tokens) // num_records, 1)
    sizes.write_text(json.dumps(vars(mean)))
    return shards, mean
