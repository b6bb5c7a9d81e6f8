"""What a server refuses, how it says so, and that it goes on afterwards: limits, odd requests, strangers, leavers."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="serving needs the extra 'serve'")

from served_model import NAME, TILE, Served, data_url, image_part, served, user
from tiny_model import MAX_SEQ_LEN, tiny_model_folder

from composer_path.asking.assistant import Assistant
from composer_path.serving.connection import TimedConnection
from composer_path.serving.pictures import PictureLimits

SECRET = "JaneDoe1960"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return Assistant.from_pretrained(tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model"))


@pytest.fixture(scope="module")
def model(assistant: Assistant) -> Iterator[Served]:
    with served(assistant, limits=PictureLimits(2, 40_000)) as running:
        yield running


def parts(*of_message: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*of_message, {"type": "text", "text": SECRET}]}]


@pytest.mark.parametrize(
    ("request_", "status", "param", "said"),
    [
        ({"messages": None}, 400, "messages", "must be a list of messages"),
        ({"messages": [{"role": "user", "content": SECRET, "name": SECRET}]}, 400, "messages", "role and content only"),
        (
            {"messages": [*parts(), {"role": "assistant", "content": SECRET}]},
            400,
            "messages",
            "the last must be the user",
        ),
        ({"model": SECRET}, 404, "model", "no other model"),
        ({"model": None}, 400, "model", "must be a string"),
        ({"top_k": 5}, 400, None, "top_k: is not supported"),
        ({"n": 2}, 400, "n", "only 1 is supported"),
        ({"n": True}, 400, "n", "only 1 is supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "supported, found another"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "supported, found another"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "only 0 is supported"),
        ({"user": 5}, 400, "user", "a string is supported"),
        ({"temperature": -1}, 400, "temperature", "a number from 0 to 2"),
        ({"temperature": "hot"}, 400, "temperature", "a number from 0 to 2"),
        ({"temperature": True}, 400, "temperature", "a number from 0 to 2"),
        ({"top_p": 0, "temperature": 1}, 400, "top_p", "above 0"),
        ({"top_p": 0.5}, 400, "top_p", "has no effect without temperature"),
        ({"max_tokens": 0}, 400, "max_tokens", "a whole number from 1"),
        ({"max_tokens": 2.5}, 400, "max_tokens", "a whole number from 1"),
        ({"max_completion_tokens": 4}, 400, "max_tokens", "must not differ"),
        ({"seed": 2**70}, 400, "seed", "a whole number"),
        ({"stop": [SECRET] * 5}, 400, "stop", "a list of up to 4"),
        ({"stop": ""}, 400, "stop", "none empty"),
        ({"stop": {"a": 1}}, 400, "stop", "a list of up to 4"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "from 0 to 20"),
        ({"logprobs": 1}, 400, "logprobs", "true or false"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"other": 1}}, 400, "stream_options", "include_usage only"),
        ({"messages": [{"role": "user", "content": SECRET * 200}]}, 400, "messages", rf"tokens of {MAX_SEQ_LEN}"),
        ({"messages": [{"role": "user", "content": "a" * (2**20 + 1)}]}, 413, "messages", "at most 1048576 characters"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "messages", "1 image tags .* 0 images"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_and_never_passed_over(
    model: Served, request_: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    found, error = model.error(**request_)
    assert (found, error["param"]) == (status, param) and re.search(said, error["message"]), error
    assert error["type"] == "invalid_request_error" and SECRET not in str(error)


def test_what_asks_for_nothing_is_taken(model: Served) -> None:
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": None, "user": SECRET, "tools": []}
    neutral |= {"response_format": {"type": "text"}, "stop": None, "seed": None, "max_completion_tokens": 3}
    status, content = model.ask(**neutral, temperature=0, top_p=0.3)
    assert status == 200 and content["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        (image_part("https://example.org/JaneDoe1960.png"), 400, r"found a link \(https\).*nothing is fetched"),
        (image_part("http://169.254.169.254/JaneDoe1960"), 400, r"found a link \(http\)"),
        (image_part("file:///etc/passwd"), 400, r"found a link \(file\)"),
        (image_part("/etc/passwd"), 400, "a file's path or something else"),
        (image_part("data:text/html;base64,AAAA"), 400, "a data URL of another kind"),
        (image_part("data:image/svg+xml,<svg>JaneDoe1960</svg>"), 400, "a data URL of another kind"),
        (image_part("data:image/png;base64,JaneDoe1960!"), 400, "must be base64"),
        (image_part("data:image/png;base64,"), 400, "found nothing"),
        (image_part("data:image/png;base64," + "A" * 60_000), 413, "at most 40000 bytes"),
        (
            image_part("data:image/png;base64," + base64.b64encode(SECRET.encode()).decode()),
            400,
            "an image must decode",
        ),
        ({"type": "image_url", "image_url": {"url": data_url(TILE), "more": 1}}, 400, "url and detail only"),
        ({"type": "image_url", "image_url": {"url": data_url(TILE), "detail": SECRET}}, 400, "auto, low or high"),
        ({"type": "image", "image": SECRET}, 400, "must have image_url and no more"),
        ({"type": "image_url"}, 400, "must have image_url and no more"),
        ({"type": "image_url", "image_url": 5}, 400, "found no string"),
        ({"type": "input_audio", "input_audio": SECRET}, 400, "must be text or image_url"),
    ],
)
def test_only_pictures_that_are_in_the_request_are_taken(
    model: Served, part: dict[str, Any], status: int, said: str
) -> None:
    found, error = model.error(messages=parts(part))
    assert found == status and re.search(said, error["message"]), error
    assert SECRET not in str(error)


def bomb(side: int) -> str:
    """A PNG that says that it is very large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_a_picture_that_is_a_bomb_or_cut_is_one_error_and_the_server_goes_on(model: Served) -> None:
    status, error = model.error(messages=parts(image_part(bomb(60_000))))
    assert (
        status == 400 and error["code"] == "invalid_image" and "more pixels than the limit; found" in error["message"]
    )
    tile = TILE.read_bytes()
    cut = f"data:image/jpeg;base64,{base64.b64encode(tile[: len(tile) // 2]).decode()}"
    assert model.error(messages=parts(image_part(cut)))[0] == 400
    assert model.ask(messages=[user("What?", TILE)])[0] == 200


def test_more_images_than_allowed_are_refused(model: Served) -> None:
    assert model.ask(messages=[user("What?", TILE, TILE)])[0] == 200
    status, error = model.error(messages=[user("What?", TILE, TILE, TILE)])
    assert status == 413 and "at most 2 images, found 3" in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "body: must be JSON"),
        (b"{", 400, "body: must be JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b'{"model": "a", "model": "b"}', 400, "a second value"),
        (b'{"temperature": NaN}', 400, "found NaN"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "5000 digits"),
        (b"[" * 100_000, 400, "body: must be JSON"),
        (b'{"messages": ' + b"[" * 3000 + b"]" * 3000 + b"}", 400, "64 levels"),
        (b'{"\xff": 1}', 400, "byte 0xff"),
        (b" " * 2_000_000, 413, "body: must have at most"),
    ],
)
def test_a_body_that_is_no_request_is_refused(model: Served, body: bytes, status: int, said: str) -> None:
    found, _, content = model.send("POST", CHAT, body)
    assert found == status and said in content["error"]["message"], content


def test_a_body_without_a_length_is_measured_while_it_comes(model: Served) -> None:
    connection = model.connection()
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(200):
            sent += 1
            yield b" " * 100_000

    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    connection.request("POST", CHAT, pieces(), headers, encode_chunked=True)
    assert connection.getresponse().status == 413 and sent == 200
    assert model.server._bodies._held == 0 and model.ask()[0] == 200


def test_another_content_type_is_refused_which_a_page_elsewhere_could_send_unasked(model: Served) -> None:
    status, _, content = model.send("POST", CHAT, {"model": NAME}, {"Content-Type": "text/plain"})
    assert status == 415 and "application/json" in content["error"]["message"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "", "localhost, evil"])
def test_a_name_that_is_not_this_machines_is_refused(model: Served, host: str) -> None:
    for path in ("/", "/v1/models"):
        assert model.send("GET", path, headers={"Host": host})[0] == 403


def test_pages_of_other_places_are_refused_unless_they_are_named(assistant: Assistant, model: Served) -> None:
    for origin in ("https://evil.example", "null", model.url.replace("127.0.0.1", "127.0.0.2")):
        status, headers, _ = model.send("POST", CHAT, {}, {"Origin": origin})
        assert status == 403 and "access-control-allow-origin" not in headers
    assert model.send("GET", "/v1/models", headers={"Origin": model.url})[0] == 200
    place = "https://viewer.example"
    with served(assistant, origins=(place,)) as running:
        ask = {"Origin": place, "Access-Control-Request-Headers": "authorization, content-type"}
        status, headers, _ = running.send("OPTIONS", CHAT, headers=ask)
        assert status == 204 and headers["access-control-allow-origin"] == place
        assert headers["access-control-allow-headers"] == "authorization, content-type"
        status, headers, _ = running.send("GET", "/v1/models", headers={"Origin": place})
        assert status == 200 and headers["access-control-allow-origin"] == place and headers["vary"] == "Origin"
        assert running.send("OPTIONS", CHAT, headers=ask | {"Origin": "https://evil.example"})[0] == 403


def test_a_key_is_asked_for_before_a_body_is_read(assistant: Assistant) -> None:
    key = "correct-horse-battery"
    with served(assistant, key=key) as running:
        for said in (None, "Bearer", "Bearer wrong", f"Basic {key}", f"Bearer {key}x", "Bearer \xe9"):
            headers = {} if said is None else {"Authorization": said}
            status, answered, content = running.send("POST", CHAT, b"{", headers)
            assert status == 401 and answered["www-authenticate"] == "Bearer" and key not in str(content)
        assert running.send("GET", "/v1/models", headers={"Authorization": f"bearer {key}"})[0] == 200
        assert running.send("GET", "/")[0] == running.send("GET", "/health")[0] == 200


def test_a_client_that_leaves_stops_its_answer(assistant: Assistant) -> None:
    with served(assistant, max_batch=2) as running:
        for stream in (True, False):
            connection = running.connection()
            request = {"model": NAME, "messages": [{"role": "user", "content": "What?"}], "stream": stream}
            steps = 0
            decoding = running.engine._decoding
            step = decoding.step

            def slowly(step: Any = step) -> None:
                nonlocal steps
                steps += 1
                time.sleep(0.05)
                step()

            decoding.step = slowly  # type: ignore[method-assign]
            connection.request("POST", CHAT, json.dumps(request), {"Content-Type": "application/json"})
            while running.engine.num_running == 0:
                time.sleep(0.01)
            assert connection.sock is not None
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            end = time.monotonic() + 10
            while running.engine.num_running and time.monotonic() < end:
                time.sleep(0.01)
            assert running.engine.num_running == 0 and steps < 40  # it would have been 60 and more
            decoding.step = step  # type: ignore[method-assign]
        assert running.ask()[0] == 200


def test_more_than_may_wait_are_told_to_come_again(assistant: Assistant) -> None:
    with served(assistant, max_batch=1, max_waiting=0) as running:
        status, error = running.error()
        assert status == 429 and error["type"] == "rate_limit_error"


def test_a_connection_without_a_whole_request_is_cut_off_and_a_slow_answer_is_not(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimedConnection, "seconds", 0.3)
    with served(assistant) as running:
        address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
        head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        for said in (b"", head, head + b"\r\n" + head):  # nothing, half a request, half a second one
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(said)
                received = b""
                with contextlib.suppress(ConnectionResetError):
                    while data := connection.recv(1000):
                        received += data
            assert (b" 200 OK" in received) == (said.count(b"GET") == 2)
        step = running.engine._decoding.step

        def slowly() -> None:
            time.sleep(0.3)
            step()

        running.engine._decoding.step = slowly  # type: ignore[method-assign]
        assert running.ask(max_tokens=4)[0] == 200


def test_an_answer_that_takes_too_long_is_ended(assistant: Assistant) -> None:
    with served(assistant, seconds=0.0) as running:
        status, error = running.error()
        assert status == 504 and error["code"] == "timeout"
        stream = running.ask(stream=True)
        assert stream[0] == 200 and b'"code": "timeout"' in stream[1] and b"[DONE]" not in stream[1]


def test_a_model_that_fails_is_told_without_its_words_and_others_are_answered_again(assistant: Assistant) -> None:
    with served(assistant) as running:
        decoding = running.engine._decoding
        for name in ("begin", "step"):
            real = getattr(decoding, name)

            def broken(*_: Any) -> None:
                raise RuntimeError(SECRET)

            setattr(decoding, name, broken)
            status, error = running.error()
            assert status == 500 and "RuntimeError" in error["message"] and SECRET not in str(error)
            setattr(decoding, name, real)
            assert running.ask()[0] == 200


def test_a_fault_of_ours_is_told_and_logged_without_what_was_asked(
    assistant: Assistant, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(assistant) as running:

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError(SECRET)

        monkeypatch.setattr(assistant, "begin", broken)
        status, error = running.error()
        assert status == 500 and SECRET not in str(error)
    logged = capfd.readouterr().err
    assert "bug: RuntimeError at test_serving_limits.py" in logged and SECRET not in logged


def test_nothing_that_is_asked_or_answered_is_logged(model: Served, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    status, content = model.ask(messages=[user(SECRET, TILE)], stop=[SECRET], user=SECRET)
    assert status == 200
    model.send("GET", f"/{SECRET}?{SECRET}")
    model.send("GET", f"/health?{SECRET}")
    model.send(SECRET, "/health")
    model.send("POST", CHAT, {SECRET: SECRET})
    out, err = capfd.readouterr()
    said = content["choices"][0]["message"]["content"]
    assert said and said not in err + out and SECRET not in err + out
    assert f"POST {CHAT} 200" in err and "GET (another path) 404" in err and "(another method) /health" in err


def test_another_address_or_way_is_an_error_in_the_same_shape(model: Served) -> None:
    for method, path, status in (("GET", "/v1/embeddings", 404), ("GET", CHAT, 405), ("POST", "/", 405)):
        found, headers, content = model.send(method, path)
        assert found == status and content["error"]["type"] == "invalid_request_error"
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


def test_a_rotated_or_transparent_picture_is_seen_as_ask_sees_it(model: Served, tmp_path: Any) -> None:
    picture = Image.open(TILE).convert("RGBA").resize((90, 60))
    picture.putalpha(120)
    file = io.BytesIO()
    picture.save(file, "PNG")
    (tmp_path / "picture.png").write_bytes(file.getvalue())
    url = data_url(tmp_path / "picture.png", "image/png")
    status, content = model.ask(messages=[{"role": "user", "content": [image_part(url)]}], max_tokens=9)
    image = model.assistant.read_image(tmp_path / "picture.png")
    said = model.assistant.answer([("human", "<image>")], [image], max_new_tokens=9)
    assert status == 200 and content["choices"][0]["message"]["content"] == said
