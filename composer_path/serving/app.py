"""The web application: what each address answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from composer_path.asking.answer import Answer, Picture
from composer_path.asking.assistant import Assistant
from composer_path.asking.sampling import Drawn
from composer_path.images.examiner import Examiner
from composer_path.images.memory import ImageMemory
from composer_path.parallel import ProcessKilled
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.records.messages import Asked
from composer_path.records.rules import ImageError
from composer_path.serving.body import BodyReader
from composer_path.serving.chat_request import ChatRequest, read_chat_request
from composer_path.serving.completion import DONE, Completion, event
from composer_path.serving.engine import Engine, Event, Job
from composer_path.serving.page import CONTENT_SECURITY_POLICY, PAGE
from composer_path.serving.pictures import PictureLimits, picture_bytes, unreadable
from composer_path.serving.refusal import Refusal
from composer_path.serving.token_text import TokenText

PATHS = ("/", "/health", "/v1/models", "/v1/chat/completions")
_PREPARED_AT_ONCE = 2  # requests whose pictures are decoded
_IMAGE_MEMORY = ImageMemory(2 * 2**30, _PREPARED_AT_ONCE)
_SENDING_SECONDS = 60.0  # after which a client that takes nothing is left


class ChatServer:
    """Answers of a model, by HTTP.

    Args:
        assistant: Of the model.
        engine: That asks it.
        name: Of the model.
        limits: Of pictures.
        seconds: That an answer may take.
    """

    def __init__(
        self, assistant: Assistant, engine: Engine, name: str, limits: PictureLimits, seconds: float = 600.0
    ) -> None:
        self._assistant, self._engine, self._name = assistant, engine, name
        self._limits, self._seconds = limits, seconds
        self._bodies = BodyReader(limits.body_bytes, 2 * limits.body_bytes)
        self._examiner = Examiner(_IMAGE_MEMORY)
        self._token_text = TokenText(assistant.tokenizer)
        self._threads: anyio.CapacityLimiter | None = None

    def app(self) -> Starlette:
        """The application, without its gate."""
        page: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self._page,
            "/health": self._health,
            "/v1/models": self._models,
        }
        routes = [Route(path, handler, methods=["GET"]) for path, handler in page.items()]
        routes += [Route("/v1/models/{model:path}", self._model, methods=["GET"])]
        routes += [Route("/v1/chat/completions", self._chat, methods=["POST"])]
        handlers: dict[Any, Callable[[Request, Exception], Coroutine[Any, Any, Response]]]
        handlers = {HTTPException: _no_such, Refusal: _refused, Exception: _at_fault}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _page(self, request: Request) -> Response:
        policy = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Frame-Options": "DENY"}
        return HTMLResponse(PAGE, headers=policy)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self._name:
            message = "model: there is no other model than the one served; GET /v1/models names it"
            raise Refusal(message, 404, "model", "model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        told = {"takes_question": self._assistant.takes_question, "max_images": self._limits.images}
        told |= {"max_image_bytes": self._limits.image_bytes}
        return {"id": self._name, "object": "model", "created": 0, "owned_by": "composer_path", "composer_path": told}

    async def _chat(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another place can't send unasked
            raise Refusal("Content-Type: must be application/json; found another; send JSON", 415)
        try:
            body = await self._bodies.read(request)
        except ClientDisconnect:
            return Response(status_code=400)
        size = len(body)
        self._threads = self._threads or anyio.CapacityLimiter(_PREPARED_AT_ONCE)
        try:
            asked, answer = await anyio.to_thread.run_sync(self._prepare, body, limiter=self._threads)
        finally:
            del body
            self._bodies.release(size)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(told: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, told)

        job = Job(answer, asked.stream, tell)
        self._engine.submit(job)
        completion = Completion(self._name, answer, self._token_text)
        return _Answering(job, events, completion, asked, self._seconds)

    def _prepare(self, body: bytes) -> tuple[ChatRequest, Answer]:
        """Read a request and its pictures, in a thread."""
        request = read_chat_request(body, self._name)
        asked = request.asked
        if len(asked.pictures) > self._limits.images:
            found, fix = f"found {len(asked.pictures)}", "send fewer"
            raise Refusal(f"messages: must have at most {self._limits.images} images, {found}; {fix}", 413, "messages")
        pictures: list[Picture] = []
        for number, held in enumerate(asked.pictures, 1):
            try:
                pictures.append(self._assistant.read_picture(picture_bytes(held, number, self._limits), self._examiner))
            except ImageError as error:
                raise unreadable(error, number) from None
            except ProcessKilled:
                raise Refusal(f"image {number}: its decoder was killed; send a smaller one", 503) from None
        turns = () if self._is_for_captioner(asked) else asked.turns
        try:
            prompt = self._assistant.prompt(turns, pictures, system=asked.system)
        except ValueError as error:
            raise Refusal(f"messages: {error}", param="messages") from None
        return request, self._assistant.begin(prompt, request.sampling)

    def _is_for_captioner(self, asked: Asked) -> bool:
        """Whether a model that takes no question is asked none."""
        if self._assistant.takes_question or asked.system is not None or len(asked.turns) > 1:
            return False
        return not asked.turns[0].text.replace(IMAGE_TAG, "").strip()


class _Answering(Response):
    """The answer to a request, as it is written; who leaves is left."""

    def __init__(
        self, job: Job, events: asyncio.Queue[Event], completion: Completion, asked: ChatRequest, seconds: float
    ) -> None:
        super().__init__()
        self._job, self._events, self._completion, self._asked = job, events, completion, asked
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, unless the client leaves before."""
        sending = asyncio.ensure_future(self._send(scope, receive, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._job.leave()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._asked.stream:
            await self._send_stream(send)
            return
        text, tokens = "", list[Drawn]()
        try:
            async with asyncio.timeout(self._seconds):
                while (told := await self._events.get())[0] != "end":
                    if told[0] == "failed":
                        raise told[1]
                    text, tokens = text + told[1], tokens + told[2]
            response = JSONResponse(self._completion.whole(text, tokens))
        except TimeoutError:
            response = _in_json(_too_long(self._seconds))
        except Refusal as refusal:
            response = _in_json(refusal)
        await response(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(_SENDING_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        told_of = self._completion
        try:
            async with asyncio.timeout(self._seconds):
                await say(event(told_of.chunk(first=True)))
                while (told := await self._events.get())[0] != "end":
                    if told[0] == "failed":
                        raise told[1]
                    await say(event(told_of.chunk(told[1], told[2])))
        except TimeoutError:
            await say(event(_too_long(self._seconds).to_json()), more=False)
            return
        except Refusal as refusal:
            await say(event(refusal.to_json()), more=False)
            return
        last = [told_of.chunk()] + ([told_of.usage_chunk()] if self._asked.include_usage else [])
        await say(b"".join(map(event, last)) + DONE, more=False)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_long(seconds: float) -> Refusal:
    return Refusal(f"the answer took more than {seconds:.0f} s; ask for fewer tokens", 504, code="timeout")


def _in_json(refusal: Refusal) -> JSONResponse:
    retry = {"Retry-After": "1"} if refusal.status in (429, 503) else {}
    return JSONResponse(refusal.to_json(), refusal.status, headers=retry)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _in_json(error)


async def _no_such(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    rule = "is answered in another way (GET or POST)" if status == 405 else f"is none of {', '.join(PATHS)}"
    return _in_json(Refusal(f"the address {rule}", status))


async def _at_fault(request: Request, error: Exception) -> Response:
    return _in_json(Refusal("the server has a fault; its terminal says where", 500))
