"""Who may ask: names by which this machine is called, pages of other places, keys. And the line logged of a request."""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from composer_path.serving.refusal import Refusal

_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:.]+\](:\d{1,5})?", re.ASCII)
_LEAST_KEY = 16
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def read_key(path: Path) -> str:
    """The key in a file; ValueError where it holds none that can be used."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError:
        lines = []
    if len(lines) != 1 or len(lines[0]) < _LEAST_KEY or not lines[0].isascii() or not lines[0].isprintable():
        raise ValueError(
            f"--api-key-file {path}: must hold one word of {_LEAST_KEY} letters or more, found something else; write "
            "one, such as `openssl rand -hex 24` gives"
        )
    return lines[0]


def check_origin(origin: str) -> str:
    """A page's place as browsers say it; ValueError otherwise."""
    if not _ORIGIN.fullmatch(origin):
        raise ValueError(f"--allow-origin: must be like https://viewer.example, found {origin!r}; write it so")
    return origin


class Gate:
    """Lets requests in, or answers them itself.

    Args:
        app: What answers those that may come in.
        names: What `Host` may say, without its port; None for anything (where a key is asked for).
        key: That everything below `protected` must bring; None for none.
        origins: Of pages of other places that may ask.
        open_paths: Paths that may be written to the log; of others it isn't known what they hold.
        protected: Where keys are asked for.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: Sequence[str] | None,
        key: str | None,
        origins: Sequence[str] = (),
        open_paths: Sequence[str] = (),
        protected: str = "/v1/",
    ) -> None:
        self._app, self._names, self._key = app, names, key
        self._origins, self._paths, self._protected = frozenset(origins), frozenset(open_paths), protected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        began, status = time.monotonic(), 0
        headers = Headers(scope=scope)
        allowed = headers.get("origin") in self._origins

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    ours.setdefault(name, value)
                if self._origins:
                    ours["Vary"] = "Origin"
                if allowed:
                    ours["Access-Control-Allow-Origin"] = headers["origin"]
                    ours["Cross-Origin-Resource-Policy"] = "cross-origin"
            await send(message)

        try:
            response = self._refused(scope, headers, allowed)
            await (response or self._app)(scope, receive, answer)
        except Exception as error:  # a bug: where it is, and never what it says
            where = traceback.extract_tb(error.__traceback__)[-1]
            _say(f"bug: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}")
            if not status:
                message = "Authorization: must be 'Bearer KEY' with the server's key; found another or none"
                return _answer(Refusal(message, 401, code="invalid_api_key"), {"WWW-Authenticate": "Bearer"})
        return None


def _answer(refusal: Refusal, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(refusal.to_json(), refusal.status, headers={"Connection": "close", **(headers or {})})


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


Handler = Callable[[Any], Awaitable[Response]]
