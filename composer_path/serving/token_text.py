"""The text of single tokens, as they stand inside an answer."""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase


class TokenText:
    """Texts of a tokenizer's ids, blanks in front of words included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = [int(tokenizer.encode("a", add_special_tokens=False)[-1])]  # what stands before
        self._before = self._decoded(self._anchor)
        self._of = lru_cache(maxsize=50_000)(self._measured)

    def __call__(self, id: int) -> str:
        """The text of an id; with U+FFFD where it holds a part of a character."""
        return self._of(id)

    def _measured(self, id: int) -> str:
        together = self._decoded([*self._anchor, id])
        return together[len(self._before) :] if together.startswith(self._before) else self._decoded([id])

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
