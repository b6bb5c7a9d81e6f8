"""How long a sample is for a model, and what that depends on: counted alike from shards and while they are written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from composer_path.records.conversation import Conversation
from composer_path.records.prompts import PromptTemplate, TemplateError
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import TextEncoder, Tokenizer, text_encoder
from composer_path.shards.lengths import LengthsError, LengthsKey, short_hash


@dataclass(frozen=True)
class Measure:
    """Counts a conversation's tokens, answer tokens and images, as `ConversationDataset` would make them.

    Only that an image can't be decoded isn't seen here: such a sample is shorter than it was measured.
    """

    text: TextPreparation
    encoder: TextEncoder

    def __call__(self, conversation: Conversation) -> tuple[int, int, int]:
        """The three counts; of a sample that can't be used, one token and nothing else."""
        with suppress(TemplateError):
            tokens = self.text.tokenize(conversation, self.encoder)
            if tokens.num_answer_tokens:
                return len(tokens.input_ids), tokens.num_answer_tokens, tokens.num_images
        return UNUSABLE

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return _restored, (self._pickled,)

    @cached_property
    def _pickled(self) -> bytes:
        return pickle.dumps((self.text, self.encoder.tokenizer))


UNUSABLE = (1, 0, 0)


@lru_cache(maxsize=4)
def _restored(pickled: bytes) -> Measure:
    """A process gets it with each of its tasks, and builds the encoder, which takes a second, once."""
    text, tokenizer = pickle.loads(pickled)
    return Measure(text, text_encoder(tokenizer))


def lengths_key(tokenizer: Tokenizer, text: TextPreparation) -> LengthsKey:
    """The key of lengths, of no set yet (see `LengthsKey.of_set`)."""
    if not isinstance(text.num_image_tokens, int):
        raise LengthsError("balance: needs the same number of tokens for every image; leave balance out")
    return LengthsKey(
        index="",
        tokenizer=tokenizer_hash(tokenizer),
        template=template_hash(text.template),
        num_image_tokens=text.num_image_tokens,
        max_seq_len=text.max_seq_len,
        image_position=text.image_position,
    )


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A hash of what decides a tokenizer's ids: its files' contents, special tokens and chat template; not its path."""
    encoder = text_encoder(tokenizer)
    parts: dict[str, Any] = {
        "special_tokens": sorted(encoder.special_tokens.items()),
        "named": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
        "prefix_after_special": encoder.prefix_after_special,
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
    state = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    if file.is_file():
        state.update(file.read_bytes())
    if tokenizer.is_fast:
        state.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        state.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return state.hexdigest()[:16]


def template_hash(template: PromptTemplate) -> str:
    """A template's name and a hash of its settings."""
    return (
        f"{template.name}-{short_hash(json.dumps(dataclasses.asdict(template), sort_keys=True, default=str).encode())}"
    )
