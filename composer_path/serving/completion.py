"""The answer to a chat request, whole or in chunks, in OpenAI's words."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from composer_path.asking.answer import Answer
from composer_path.asking.sampling import Drawn

DONE = b"data: [DONE]\n\n"


class Completion:
    """What is said of one answer.

    Args:
        model: Its name.
        answer: The answer.
        token_text: The text of a token, for probabilities.
    """

    def __init__(self, model: str, answer: Answer, token_text: Callable[[int], str]) -> None:
        self._answer, self._token_text = answer, token_text
        self._wants_logprobs = answer.sampling.top_logprobs is not None
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, tokens: Sequence[Drawn]) -> dict[str, Any]:
        """The answer, once it has ended."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": self._logprobs(tokens)}
        choice["finish_reason"] = self._answer.finish
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self.usage()}

    def chunk(self, text: str | None = None, tokens: Sequence[Drawn] = (), *, first: bool = False) -> dict[str, Any]:
        """A piece of it; without text the end, as `first` the beginning."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        delta |= {} if text is None else {"content": text}
        finish = self._answer.finish if text is None and not first else None
        logprobs = self._logprobs(tokens) if tokens else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """What comes last where counts were asked for."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens read (an image's are among them), written (the one that ends it, too), and both."""
        read, written = len(self._answer.prompt.input_ids), self._answer.num_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _logprobs(self, tokens: Sequence[Drawn]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        content = [
            {**self._token(one.id, one.logprob), "top_logprobs": [self._token(id, value) for id, value in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(id)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
