"""A request for a chat completion: its parameters, each checked; what isn't supported is refused, never passed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer_path.asking.sampling import Sampling
from composer_path.records.key_names import shown_identifier
from composer_path.records.messages import Asked, MessageError, read_messages
from composer_path.records.rules import RecordError
from composer_path.records.strict_json import decode_json
from composer_path.serving.refusal import Refusal

# Of OpenAI's others those that clients send with a value that asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "store": (False,),
}
TAKEN = (
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("stop", "seed", "logprobs", "top_logprobs"),
)
LARGEST = 2**31 - 1
MOST_STOPS, LONGEST_STOP = 4, 500
MOST_TEXT = 2**20  # characters of all messages


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        asked: Its messages.
        sampling: How the answer is to be written.
        stream: Whether it is to come in pieces.
        include_usage: Whether counts come at the end of these.
    """

    asked: Asked
    sampling: Sampling
    stream: bool
    include_usage: bool


def read_chat_request(body: bytes, model: str) -> ChatRequest:
    """Read a request's body, which must ask for this model.

    Raises:
        Refusal: It is no such request, or asks for what isn't supported.
    """
    try:
        request = decode_json(body)
    except RecordError as error:
        raise Refusal(f"body: must be JSON; found {error.found}; {error.fix}") from None
    if not isinstance(request, dict):
        raise Refusal("body: must be a JSON object; found something else; send {'model', 'messages', ...}")
    for key, value in request.items():
        _check_supported(key, value)
    given = {key: value for key, value in request.items() if value is not None}
    if not isinstance(asked_of := given.get("model"), str):
        raise _wrong("model", "a string")
    if asked_of != model:
        fix = "GET /v1/models names the one that is served"
        raise Refusal(f"model: there is no other model than the one served; {fix}", 404, "model", "model_not_found")
    stream = _taken(given, "stream", bool, "true or false", False)
    try:
        asked = read_messages(given.get("messages"))
    except MessageError as error:
        raise Refusal(str(error), param="messages") from None
    if asked.turns[-1].role != "human":
        raise Refusal("messages: the last must be the user's, found another; ask something", param="messages")
    if sum(len(turn.text) for turn in asked.turns) + len(asked.system or "") > MOST_TEXT:
        raise Refusal(f"messages: must have at most {MOST_TEXT} characters; shorten them", 413, "messages")
    return ChatRequest(asked, _sampling(given), stream, _include_usage(given, stream))


def _check_supported(key: str, value: Any) -> None:
    if key in TAKEN or (key == "user" and isinstance(value, str)):  # a user's name changes no answer; it isn't kept
        return
    known = key in NEUTRAL or key == "user"
    neutral = NEUTRAL.get(key, ())
    same = [one for one in neutral if value == one and isinstance(value, bool) == isinstance(one, bool)]
    if known and (value is None or same):
        return
    if not known:
        raise Refusal(f"{shown_identifier(key)}: is not supported here; leave it out", code="unsupported_parameter")
    only = f"only {neutral[0]!r} is" if neutral else "a string is"
    raise Refusal(f"{key}: {only} supported, found another value; leave it out", param=key, code="unsupported_value")


def _sampling(given: Mapping[str, Any]) -> Sampling:
    settings: dict[str, Any] = {}
    limits = {_number(given, key, int, 1, LARGEST) for key in ("max_tokens", "max_completion_tokens") if key in given}
    if len(limits) > 1:
        raise Refusal("max_tokens: must not differ from max_completion_tokens; leave one out", param="max_tokens")
    if limits:
        settings["max_new_tokens"] = limits.pop()
    if "temperature" in given:
        settings["temperature"] = _number(given, "temperature", float, 0, 2)
    if "top_p" in given:
        settings["top_p"] = _number(given, "top_p", float, 0, 1)
        if settings["top_p"] == 0:
            raise _wrong("top_p", "a number above 0 and at most 1")
        if settings["top_p"] < 1 and "temperature" not in given:
            message = "top_p: has no effect without temperature, which is 0 here unless it is given; give both"
            raise Refusal(message, param="top_p", code="unsupported_value")
    if "seed" in given:
        settings["seed"] = _number(given, "seed", int, -(2**63), 2**63 - 1)
    settings["stop"] = _stops(given)
    wanted = _taken(given, "logprobs", bool, "true or false", False)
    if "top_logprobs" in given and not wanted:
        raise Refusal("top_logprobs: needs logprobs: true; give it, or leave this out", param="top_logprobs")
    if wanted:
        settings["top_logprobs"] = _number(given, "top_logprobs", int, 0, 20) if "top_logprobs" in given else 0
    return Sampling(**settings)


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    right = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not right or not all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in stops):
        raise _wrong("stop", f"a text, or a list of up to {MOST_STOPS}, none empty or longer than {LONGEST_STOP}")
    return tuple(stops)


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise Refusal("stream_options: needs stream: true; give it, or leave this out", param="stream_options")
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise _wrong("stream_options", "an object with include_usage only")
    return bool(_taken(options, "include_usage", bool, "true or false", False))


def _number(given: Mapping[str, Any], key: str, kind: type, low: int, most: int) -> Any:
    value: Any = given[key]
    kinds = (int,) if kind is int else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool)
    if not right or not low <= value <= most:
        raise _wrong(key, f"a {'whole ' if kind is int else ''}number from {low} to {most}")
    return kind(value)


def _taken(given: Mapping[str, Any], key: str, kind: type, words: str, default: Any) -> Any:
    value = given.get(key, default)
    if not isinstance(value, kind):
        raise _wrong(key, words)
    return value


def _wrong(key: str, words: str) -> Refusal:
    return Refusal(f"{key}: must be {words}; found another value; correct it", param=key, code="invalid_value")
