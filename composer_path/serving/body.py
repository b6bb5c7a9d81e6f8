"""A request's body: read within limits of size, time, and of what all requests hold together."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from composer_path.serving.refusal import Refusal, busy


class BodyReader:
    """Reads bodies.

    Args:
        largest: Bytes that one may have.
        together: Bytes that all may have that are being read or worked on.
        seconds: In which one must be here.
    """

    def __init__(self, largest: int, together: int, seconds: float = 60.0) -> None:
        self._largest, self._together, self._seconds = largest, together, seconds
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """Return a body, whose bytes count as held until `release`.

        Raises:
            Refusal: It is too large or too slow, or too much is held already.
            ClientDisconnect: The client left.
        """
        said = request.headers.get("content-length", "0")
        if not said.isdecimal() or int(said[:20]) > self._largest:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in request.stream():
                    if size + len(chunk) > self._largest:
                        raise self._too_large()
                    if self._held + len(chunk) > self._together:
                        raise busy()
                    size += len(chunk)
                    self._held += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            self.release(size)
            raise Refusal(f"body: must be here within {self._seconds:.0f} s; send it again", 408) from None
        except (Refusal, ClientDisconnect):
            self.release(size)
            raise
        return b"".join(chunks)

    def release(self, size: int) -> None:
        """A body of this size is no longer held."""
        self._held -= size

    def _too_large(self) -> Refusal:
        return Refusal(f"body: must have at most {self._largest} bytes; found more; send less", 413, code="too_large")
