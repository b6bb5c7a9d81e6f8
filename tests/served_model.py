"""A model folder behind a real server on loopback, in a thread of this process."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_model import IMAGES

from composer_path.asking.assistant import Assistant
from composer_path.serving.app import PATHS, ChatServer
from composer_path.serving.engine import Engine
from composer_path.serving.gate import LOCAL_NAMES, Gate
from composer_path.serving.pictures import PictureLimits
from composer_path.serving.server import address_of, listen, server_of

TILE = IMAGES / "cmu_x1120_y1960_160.jpg"
OTHER_TILE = IMAGES / "ihc_x0264_y0352_160.jpg"
NAME = "tiny"


def data_url(path: Path, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(question: str | None, *images: Path) -> dict[str, Any]:
    """A message of the user, images first."""
    parts: list[dict[str, Any]] = [image_part(data_url(image)) for image in images]
    return {"role": "user", "content": parts + ([] if question is None else [{"type": "text", "text": question}])}


@dataclass
class Served:
    """A server that is running."""

    assistant: Assistant
    engine: Engine
    server: ChatServer
    url: str

    def client(self, **keywords: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **keywords)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and content of an answer; a body that is no bytes goes as JSON."""
        connection = self.connection()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        said = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, said, json.loads(content) if "json" in said.get("content-type", "") else content

    def ask(self, **request: Any) -> tuple[int, Any]:
        """Status and content of a chat request."""
        request = {"model": NAME, "messages": [{"role": "user", "content": "What?"}], "max_tokens": 3} | request
        status, _, content = self.send("POST", "/v1/chat/completions", request)
        return status, content

    def error(self, **request: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of a chat request that is refused."""
        status, content = self.ask(**request)
        assert content.keys() == {"error"} and content["error"].keys() == {"message", "type", "param", "code"}
        return status, content["error"]


@contextmanager
def served(
    assistant: Assistant,
    *,
    limits: PictureLimits | None = None,
    max_batch: int = 16,
    max_waiting: int = 64,
    seconds: float = 60.0,
    key: str | None = None,
    origins: tuple[str, ...] = (),
) -> Iterator[Served]:
    """Serve a model until the block ends."""
    engine = Engine(assistant, max_batch, max_waiting)
    chat = ChatServer(assistant, engine, NAME, limits or PictureLimits(), seconds)
    gate = Gate(chat.app(), names=LOCAL_NAMES, key=key, origins=origins, open_paths=PATHS)
    with listen("127.0.0.1", 0) as listening:
        server = server_of(gate)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Served(assistant, engine, chat, address_of(listening))
        finally:
            server.should_exit = True
            engine.end()
            thread.join(20)
            assert not thread.is_alive()
