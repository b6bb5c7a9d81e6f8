"""Answer questions by HTTP, as OpenAI's chat interface and on a page."""

from __future__ import annotations

import argparse
import re
from importlib.util import find_spec
from pathlib import Path

from composer_path.commands.verb import add_import, at_least_1, import_given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, where it is served, and how much is taken."""
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="written by export or at a run's end")
    add("--host", default="127.0.0.1", help="elsewhere than on this machine needs a key (default: 127.0.0.1)")
    add("--port", type=_port, default=8000, help="0 for any that is free (default: 8000)")
    add("--name", help="of the model, for its clients (default: its folder's)")
    add("--api-key-file", metavar="FILE", type=Path, help="a file with the word that clients must bring")
    add("--allow-origin", metavar="ORIGIN", action="append", default=[], help="a page of another place that may ask")
    add("--max-images", metavar="N", type=at_least_1, default=8, help="of a request (default: 8)")
    add("--max-image-bytes", metavar="SIZE", type=_size, default="16mb", help="of an image's file (default: 16mb)")
    add("--max-batch", metavar="N", type=at_least_1, default=16, help="answered at once (default: 16)")
    add("--timeout", metavar="SECONDS", type=at_least_1, default=600, help="for an answer (default: 600)")
    add_import(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    if lacking := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise ValueError(f"serve needs the package {lacking[0]}; pip install 'composer_path[serve]'")

    from composer_path.serving.gate import LOCAL_NAMES, Gate, check_origin, read_key
    from composer_path.serving.server import address_of, is_loopback, listen, serve_until_interrupted

    key = None if options.api_key_file is None else read_key(options.api_key_file)
    origins = [check_origin(origin) for origin in options.allow_origin]
    with listen(options.host, options.port) as listening:
        local = is_loopback(listening)
        if not local and key is None:
            where = f"--host {options.host}: other machines reach it"
            raise ValueError(f"{where}, so that a key is needed; give --api-key-file, or leave --host out")

        from composer_path.asking.assistant import Assistant
        from composer_path.serving.app import PATHS, ChatServer
        from composer_path.serving.engine import Engine
        from composer_path.serving.pictures import PictureLimits

        import_given(options)
        assistant = Assistant.from_pretrained(options.model)
        engine = Engine(assistant, options.max_batch, 4 * options.max_batch)
        name = (options.name or options.model.resolve().name or "model").encode("utf-8", "replace").decode()
        limits = PictureLimits(options.max_images, options.max_image_bytes)
        app = ChatServer(assistant, engine, name, limits, float(options.timeout)).app()
        names = tuple(dict.fromkeys((*LOCAL_NAMES, options.host.lower()))) if local else None
        gate = Gate(app, names=names, key=key, origins=origins, open_paths=PATHS)
        listening.listen()
        print(f"serving '{name}' at {address_of(listening)} (a page to ask; clients use /v1); Ctrl-C ends", flush=True)
        serve_until_interrupted(gate, listening)
        engine.end()
    print("ended", flush=True)
    return 0


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, found {text!r}")
    return int(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d{0,5})(kb|mb)", text.lower(), re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 500kb or 16mb, found {text!r}")
    return int(match[1]) * {"kb": 2**10, "mb": 2**20}[match[2]]
