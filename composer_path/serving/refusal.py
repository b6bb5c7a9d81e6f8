"""What a request is refused with, in the shape of OpenAI's errors; never with anything of what was sent."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that gets no answer.

    Args:
        message: Where, the rule, what was found, what to do.
        status: Of HTTP.
        param: The parameter that is meant.
        code: A word for programs.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def busy() -> Refusal:
    """Too much is asked at once."""
    return Refusal("the server has as much to do as it takes; ask again later", 429, code="rate_limit_exceeded")
