"""One answer while it is being written: its tokens, its text, where it ends, and what of it may be shown already."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int64, UInt8
from torch import Tensor

from composer_path.asking.sampling import Drawn, Sampler, Sampling

Picture = UInt8[Tensor, "3 height width"]
_UNFINISHED = "\ufffd"  # stands for bytes whose character isn't whole yet


@dataclass(frozen=True)
class Prompt:
    """What is asked, as the model reads it.

    Attributes:
        input_ids: Of the conversation, negative where an image stands.
        images: In their order.
        room: How many tokens the model may write behind it.
    """

    input_ids: Int64[Tensor, " tokens"]
    images: tuple[Picture, ...]
    room: int


class Answer:
    """An answer to a prompt, token by token.

    Args:
        prompt: What is asked.
        sampling: How its tokens are chosen, and what ends it besides.
        decode: The text of ids.
        end_ids: Tokens that end an answer.
        byte_ids: Tokens that are single bytes; what a row of them reads is known at its end only.
        cleans: Whether `decode` takes blanks out again that stood before a later sign.

    Attributes:
        drawn: Its tokens, without the one that ends it.
        num_tokens: How many were written, with that one.
        finish: Why it ended: `stop` by itself or by a stop text, `length` where it was cut; None while it goes on.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampling: Sampling,
        decode: Callable[[list[int]], str],
        end_ids: Collection[int],
        byte_ids: Collection[int] = (),
        cleans: bool = False,
    ) -> None:
        self.prompt, self.sampling, self.sampler = prompt, sampling, Sampler(sampling)
        self.drawn: list[Drawn] = []
        self.num_tokens = 0
        self.finish: Literal["stop", "length"] | None = None
        self._decode, self._end_ids, self._cleans = decode, frozenset(end_ids), cleans
        self._byte_ids = frozenset(byte_ids)
        self._limit = min(prompt.room, sampling.max_new_tokens)
        self._starts: list[int] = []  # where each token's text begins, known where there are stop texts
        self._cut: int | None = None  # where a stop text begins
        self._shown, self._num_shown = "", 0

    def add(self, drawn: Drawn) -> None:
        """Write one more token."""
        self.num_tokens += 1
        if drawn.id in self._end_ids:
            self.finish = "stop"
            return
        if self.sampling.stop:
            self._starts.append(len(self._decoded()))
        self.drawn.append(drawn)
        if self.sampling.stop:
            written = self._decoded()
            found = [place for text in self.sampling.stop if (place := written.find(text)) >= 0]
            if found:
                self._cut, self.finish = min(found), "stop"
        if self.finish is None and self.num_tokens >= self._limit:
            self.finish = "length"

    @property
    def text(self) -> str:
        """All of it so far."""
        return self._decoded()[: self._cut].strip()

    def tokens(self) -> list[Drawn]:
        """Its tokens without those behind a stop text's beginning."""
        if self._cut is None:
            return self.drawn
        return [drawn for drawn, start in zip(self.drawn, self._starts, strict=True) if start < self._cut]

    def piece(self) -> tuple[str, list[Drawn]]:
        """What may be shown since it was last asked for: all pieces together are the text; and the tokens of it."""
        whole = self._decoded()[: self._cut]
        certain = (whole if self.finish else self._certain()).strip()
        if not certain.startswith(self._shown):  # a tokenizer that changes what stands before; at the end all is said
            certain = self._shown + certain[len(self._shown) :] if self.finish else self._shown
        new, self._shown = certain[len(self._shown) :], certain
        end = len(whole) - len(whole.lstrip()) + len(certain)
        tokens = self.tokens()
        ready = len(tokens) if self.finish or not self._starts else sum(start < end for start in self._starts)
        ready = max(ready, self._num_shown) if new or self.finish else self._num_shown
        shown, self._num_shown = tokens[self._num_shown : ready], ready
        return new, shown

    def _decoded(self) -> str:
        return self._decode([drawn.id for drawn in self.drawn])

    def _certain(self) -> str:
        """The beginning of an unfinished text that no further token changes."""
        ids = [drawn.id for drawn in self.drawn]
        while ids and ids[-1] in self._byte_ids:
            ids.pop()
        text = self._decode(ids).rstrip(_UNFINISHED)
        if self._cleans:  # blanks before a sign may go, of two words at most
            text = " ".join(text.split(" ")[:-2])
        for stop in self.sampling.stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    text = text[:-length]
                    break
        return text
