"""A made-up instruction set with real tiles and the length distribution of real ones, and a vocabulary of 512 pieces.

So small a vocabulary keeps the head's share of a small model's work what it is in a 7B (2 %).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from benchmarks.proportions import draw_instruction

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES = REPOSITORY / "test_data" / "imgs"


@dataclass(frozen=True)
class InstructionSet:
    """Where a set lies.

    Attributes:
        data: The JSON file.
        shards: The same records as MDS, made by the real conversion.
        tokenizer: Folder of the vocabulary.
    """

    data: Path
    shards: Path
    tokenizer: Path


def write_instruction_set(folder: Path, num_records: int, shorter: int) -> InstructionSet:
    """Write records, convert them, and train the vocabulary.

    Args:
        folder: Made if it isn't there; a set that lies there already is taken.
        num_records: Each has one question with one tile and one answer.
        shorter: Divides the lengths of `draw_instruction`.
    """
    found = InstructionSet(folder / "data.json", folder / "shards", folder / "tokenizer")
    if (folder / "complete").exists():
        return found
    from composer_path.conversion.convert import convert

    folder.mkdir(parents=True, exist_ok=True)
    words = demo_words()
    pieces = train_vocabulary(words, found.tokenizer)
    tiles = sorted(path.name for path in IMAGES.glob("*.jpg"))
    lengths = random.Random(17)
    records = []
    for index in range(num_records):
        text, answer, _ = draw_instruction(lengths)
        text, answer = text // shorter, max(2, answer // shorter)
        question = sentence(words, text - answer - 8, pieces, lengths)  # about 8 tokens are the template's
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "assistant", "value": sentence(words, answer, pieces, lengths)},
        ]
        records.append({"id": f"made-{index}", "image": lengths.choice(tiles), "conversations": turns})
    found.data.write_text(json.dumps(records), encoding="utf-8")
    convert(found.data, IMAGES, found.shards)
    (folder / "complete").touch()
    return found


def demo_words() -> list[str]:
    """Every word of the demo's conversations once."""
    records = json.loads((REPOSITORY / "test_data" / "data.json").read_text(encoding="utf-8"))
    words = {word for record in records for turn in record["conversations"] for word in turn["value"].split()}
    return sorted(word for word in words if "<" not in word)


def train_vocabulary(words: list[str], folder: Path) -> sentencepiece.SentencePieceProcessor:
    """512 pieces with bytes as a fallback, as a tokenizer folder that transformers reads as LLaMA's."""
    from composer_path.records.vocabulary import load_tokenizer, save_tokenizer

    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 3 + words),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,  # as LLaMA's: the space after an answer is a token
        minloglevel=2,
    )
    save_tokenizer(load_tokenizer(folder), folder)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def sentence(
    words: list[str], num_tokens: int, pieces: sentencepiece.SentencePieceProcessor, lengths: random.Random
) -> str:
    """Random words of about so many tokens, at least one word."""
    chosen: list[str] = []
    while num_tokens > 0 or not chosen:
        chosen.append(lengths.choice(words))
        num_tokens -= len(pieces.encode(chosen[-1]))
    return " ".join(chosen)
