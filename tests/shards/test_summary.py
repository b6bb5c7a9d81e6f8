"""The summary counts what the records hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from stored_images import resize_image
from tiny_sets import (
    NUM_RECORDS,
    REPO,
    records,
    write_set,
)

from composer_path.records.conversation import Conversation
from composer_path.shards.columns import pack_images
from composer_path.shards.summary import summarize
from composer_path.shards.view import ShardView


@pytest.mark.parametrize("workers", [1, 2])
def test_the_summary_counts_what_the_records_hold(any_set: str, workers: int) -> None:
    summary = summarize(ShardView(any_set), workers)
    conversations = [Conversation.from_record(record) for record in records()]
    turns = [turn for conversation in conversations for turn in conversation.turns]
    images = sum(conversation.num_images for conversation in conversations)
    assert (summary.records, summary.images, summary.text_only) == (NUM_RECORDS, images, 2)
    assert summary.turns == len(turns)
    assert summary.answer_chars == Counter(len(turn.text) for turn in turns if turn.role == "assistant")
    assert summary.sources == Counter(c.metadata.get("source", "") for c in conversations)
    assert summary.image_kinds == {"JPEG": images}
    assert sum(summary.image_sizes.values()) == images
    assert f"{'records':<36}{NUM_RECORDS}" in str(summary)


def test_a_summary_says_least_median_and_greatest_and_resized_images(tmp_path: Path) -> None:
    image = (REPO / "test_data" / "imgs").glob("*.jpg").__next__().read_bytes()
    turns = [["human", "<image>"], ["assistant", "a"], ["human", "bb?"], ["assistant", "b" * 9]]
    sample = {"id": "1", "conversation": {"turns": turns, "system": None}, "metadata": {}}
    square = {**sample, "images": pack_images([resize_image(image, 28)])}
    damaged = {**sample, "images": pack_images([b"no image"])}
    text = str(summarize(ShardView(write_set(tmp_path / "set", [square, square, damaged]))))
    assert "characters of an answer             1 to 9, median 1" in text
    assert "images stored as resized            2" in text
    assert "  28 x 28 pixels                    2" in text
    assert "images stored as unreadable         1" in text
