"""Train `tokenizer.model` beside this file: a small sentencepiece vocabulary with LLaMA-2's settings.

Its text is what test_data's records ask and answer, which was written for this project, so the file may be committed.
`python tests/golden/tiny_llama/make.py` writes it anew; tests/records/test_reference_rules.py says what it is for.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece

FOLDER = Path(__file__).resolve().parent
TEST_DATA = FOLDER.parents[2] / "test_data"
# What LLaMA-2's own file says of itself; only the number of pieces differs.
LLAMA_SETTINGS = {
    "model_type": "bpe",
    "split_digits": True,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "character_coverage": 0.99995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "unk_surface": " \u2047 ",
    "required_chars": "".join(map(chr, range(33, 127))) + "éµβ≈—",
}
# What the records lack and a LLaMA vocabulary has pieces for: runs of spaces, and the marks of its prompts.
MORE_TEXT = [
    "[INST] <<SYS>>  [/INST]    1. Nuclei:  large    2. Stroma:  loose",
    "  - acinar  - solid    - lepidic        - papillary",
    "[INST] What  is shown? [/INST]  Sheets  of plasma cells.  ",
]


def texts() -> list[str]:
    """All lines that the records say, in order and once each."""
    lines: dict[str, None] = {}
    for name in ("captions", "data", "heldout_captions", "heldout"):
        for record in json.loads((TEST_DATA / f"{name}.json").read_text(encoding="utf-8")):
            for turn in record["conversations"]:
                lines |= dict.fromkeys(line for line in turn["value"].replace("<image>", "").splitlines() if line)
    return [*lines, *MORE_TEXT * 4]


def train(vocab_size: int = 800) -> bytes:
    """The vocabulary; the same bytes for the same records."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=model, vocab_size=vocab_size, num_threads=1, **LLAMA_SETTINGS
    )
    return model.getvalue()


if __name__ == "__main__":
    (FOLDER / "tokenizer.model").write_bytes(train())
