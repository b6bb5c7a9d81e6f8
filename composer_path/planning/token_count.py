"""What counts a record's tokens as the training of a YAML would, before there are shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from composer_path.batches.measure import Measure
from composer_path.census.census import TokenCount
from composer_path.config.reading import load_config, plain
from composer_path.planning.measured_lengths import LOADERS, training_sets
from composer_path.records.vocabulary import load_tokenizer, text_encoder


def token_count(yaml: str, words: Sequence[str]) -> TokenCount:
    """By the first set of the YAML's train_loader: its template, tokens of an image and max_seq_len."""
    settings = plain(load_config(yaml, words))
    first, *_ = training_sets(settings, LOADERS[:1])
    encoder = text_encoder(load_tokenizer(**settings["tokenizer"]))
    whole = Measure(replace(first.text, max_seq_len=None), encoder)
    return TokenCount(f"{first.where}.max_seq_len", first.text.max_seq_len, whole, Measure(first.text, encoder))
