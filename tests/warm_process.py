"""Commands for tests whose process has imported torch and Composer already: `popen` in place of `subprocess.Popen`.

Importing them takes ten seconds of CPU, in every rank and in the launcher. One process of a test session does it once,
and forks for each command. What it forks is a process of its own like any other: the caller's child, in a session of
its own if asked, with its own environment, folder, streams, exit code and exit handlers. What gets imported by a module
alone is seen as that process starts (fresh_imports.py); a test with another claim of this kind starts an interpreter.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

PRELOADED = (
    *("composer.cli.launcher", "composer.algorithms", "streaming", "torch.utils.tensorboard"),
    *("transformers.models.llama.modeling_llama", "composer_path.train", "composer_path.run.parts"),
)
_PR_SET_CHILD_SUBREAPER = 36
_server: socket.socket | None = None
_started: dict[str, list[str]] = {}


def popen(words: Sequence[str | os.PathLike[str]], **kwargs: Any) -> subprocess.Popen:
    """Start `[sys.executable, script, …]`, or `-m module` or `-c code` in its place, or `composer …`, as Popen does."""
    return _WarmPopen([os.fspath(word) for word in words], **kwargs)


class _WarmPopen(subprocess.Popen):
    """All of Popen but how the child comes to be."""

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        cwd, env, pipes, new_session = rest[4], rest[5], rest[9:15], rest[20]
        child_streams = [own if pipe == -1 else pipe for own, pipe in ((0, pipes[0]), (1, pipes[3]), (2, pipes[5]))]
        request = {
            "words": args,
            "cwd": os.path.abspath(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "new_session": new_session,
        }
        server = _warm_server()
        _adopt_orphans(True)  # whom the server forks becomes this process's child, to be waited for as ever
        try:
            socket.send_fds(server, [json.dumps(request).encode()], child_streams)
            self.pid = int(server.recv(64))
        finally:
            _adopt_orphans(False)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def started() -> dict[str, list[str]]:
    """What `fresh_imports.import_and_look` found in the process, before anything else was imported there."""
    _warm_server()
    return _started


def _warm_server() -> socket.socket:
    global _server
    if _server is None:
        _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        _started.update(json.loads(_server.recv(1 << 16)))

        def stop(server: socket.socket = _server) -> None:
            server.close()
            process.wait()

        atexit.register(stop)
    return _server


def _adopt_orphans(yes: bool) -> None:
    assert ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0) == 0


# --- in the preloaded process ----------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Fork for each request until the other side is gone."""
    from fresh_imports import import_and_look

    found = import_and_look()
    for name in PRELOADED:
        __import__(name)
    from composer.utils.collect_env import get_cpu_model
    from tiny_run import REPO_ROOT, load_tokenizer_once
    from transformers import AutoModelForCausalLM, LlamaConfig

    load_tokenizer_once(path=str(REPO_ROOT / "test_data" / "tokenizer"))  # imports the rest of transformers
    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    AutoModelForCausalLM.from_config(tiny)  # imports the configurations of all models
    get_cpu_model()  # each trainer asks for it once in its process, and Composer starts an interpreter to find out
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads can't be forked safely"
    connection.send(json.dumps(found).encode())
    while True:
        message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            return
        read, write = os.pipe()
        between = os.fork()
        if between == 0:  # gone at once, so that its child becomes the caller's
            pid = os.fork()
            if pid == 0:
                os.close(read)
                os.close(write)
                become(connection, streams, **json.loads(message))
            os.write(write, str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)
        connection.send(os.read(read, 64))
        os.close(read)
        os.close(write)
        for stream in streams:
            os.close(stream)


def become(
    connection: socket.socket, streams: list[int], words: list[str], cwd: str, env: dict[str, str], new_session: bool
) -> NoReturn:
    """Be the command."""
    connection.close()
    if new_session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    run_words(words)


def run_words(words: list[str]) -> NoReturn:
    """Run a command's words to the end of this process, its exit handlers included."""
    random.seed()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code = 1
    try:
        execute([word for word in words if word not in ("-u", "-B")])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            code = 128 + signal.SIGINT
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def execute(words: list[str]) -> None:
    """What Python does with the words behind its own name."""
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    launchers = ("composer.cli.launcher", "composer_path.guards.launch")
    if Path(words[0]).name == "composer" or (words[1] == "-m" and words[2] in launchers):
        from composer.cli import launcher

        launcher.subprocess = SimpleNamespace(  # type: ignore[assignment]
            Popen=ForkedRank, STDOUT=subprocess.STDOUT, CalledProcessError=subprocess.CalledProcessError
        )
        sys.argv = words if Path(words[0]).name == "composer" else words[2:]
        sys.exit(importlib.import_module(words[2] if words[1] == "-m" else launchers[0]).main())
    first, *arguments = words[1:]
    if first == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path.insert(0, "")
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = arguments
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


class ForkedRank:
    """What Composer's launcher asks of a rank's `subprocess.Popen`."""

    def __init__(self, args: list[str], stdout: Any = None, stderr: Any = None, text: bool = True) -> None:
        self.args, self.stdout, self.stderr = args, None, None
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if stdout is not None:
                os.dup2(stdout.fileno(), 1)
                os.dup2(1 if stderr == subprocess.STDOUT else stderr.fileno(), 2)
            run_words(args)

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
