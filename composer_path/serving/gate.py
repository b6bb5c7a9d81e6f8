"""Who may ask: names by which this machine is called, pages of other places, keys. And the line logged of a request."""

from __future__ import annotations

import hmac
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

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
                refusal = Refusal("the server has a fault; its terminal says where", 500)
                await JSONResponse(refusal.to_json(), refusal.status)(scope, receive, answer)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "(another path)"
            client = (scope.get("client") or ("-",))[0]
            method = scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS", "HEAD") else "(another method)"
            _say(f"{client} {method} {path} {status or 'left'} {time.monotonic() - began:.2f} s")

    def _refused(self, scope: Scope, headers: Headers, allowed: bool) -> Response | None:
        """The answer to a request that may not come in, or that asks whether it may."""
        host = headers.getlist("host")
        said = host[0].lower() if len(host) == 1 else ""
        if self._names is not None and re.sub(r":\d*$", "", said) not in self._names:
            return _answer(Refusal(f"Host: must be {' or '.join(self._names)}; found another name", 403, code="host"))
        origin = headers.get("origin")
        if origin is not None and not allowed and origin not in (f"http://{said}", f"https://{said}"):
            message = "Origin: pages of other places may not ask; --allow-origin names those that may"
            return _answer(Refusal(message, 403, code="origin"))
        if scope["method"] == "OPTIONS" and allowed:
            asked = headers.get("access-control-request-headers", "")
            words = asked if re.fullmatch(r"[\w, -]{0,1000}", asked, re.ASCII) else ""
            may = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": words}
            return Response(status_code=204, headers=may)
        if self._key is not None and scope["path"].startswith(self._protected):
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._key.encode())
            if kind.lower() != "bearer" or not right:
                message = "Authorization: must be 'Bearer KEY' with the server's key; found another or none"
                return _answer(Refusal(message, 401, code="invalid_api_key"), {"WWW-Authenticate": "Bearer"})
        return None


def _answer(refusal: Refusal, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(refusal.to_json(), refusal.status, headers=headers)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
