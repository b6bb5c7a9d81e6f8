"""Object stores as fsspec file systems, through the clients that Streaming itself uses (boto3, google-cloud-storage).

The same addresses, credentials and environment variables (`S3_ENDPOINT_URL`, `AWS_*`, `GCS_KEY` and `GCS_SECRET`,
`GOOGLE_APPLICATION_CREDENTIALS`, `STORAGE_EMULATOR_HOST`) then serve conversion and training. s3fs and gcsfs are not
used: s3fs ties botocore to other versions than boto3 does, so that pip may install one of 2020 in silence.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

# A dead connection is noticed, a slow one isn't cut off; six attempts with growing pauses take about a minute.
_CONNECT_SECONDS, _READ_SECONDS, _ATTEMPTS = 10, 60, 6

_SETTINGS = ("AWS_", "S3_", "GOOGLE_", "GCS_", "STORAGE_")
_clients: dict[Any, Any] = {}
_clients_lock = threading.Lock()


class _StoredObject(AbstractBufferedFile):
    """An object opened for reading, fetched in ranges."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        from composer_path.storage.places import explained

        with explained(f"{self.fs.protocol[0]}://{self.path}", "read"):
            return self.fs.cat_file(self.path, start, end)


class _ObjectStore(AbstractFileSystem):
    """What both stores share: paths are ``bucket/key``, and there are no folders but prefixes of keys."""

    cachable = False  # a test or a notebook may change the endpoint between two uses

    @property
    def client(self) -> Any:
        """The store's client, made once (it takes 0.2 s) for all threads of a process, not shared by a fork."""
        settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}
        key = (os.getpid(), type(self), self._identity(), *sorted(settings.items()))
        with _clients_lock:
            if key not in _clients:
                _clients[key] = self._connect()
            return _clients[key]

    def _connect(self) -> Any:
        raise NotImplementedError

    def _identity(self) -> Any:
        return None

    def objects(self, bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield key and size of every object whose key begins with ``prefix``."""
        raise NotImplementedError

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any
    ) -> Any:
        """List every object below ``path``."""
        bucket, key = _split(self._strip_protocol(path))
        prefix = f"{key}/" if key else ""
        found = {
            f"{bucket}/{name}": {"name": f"{bucket}/{name}", "size": size, "type": "file"}
            for name, size in self.objects(bucket, prefix)
        }
        return found if detail else sorted(found)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List what lies directly below ``path``."""
        path = self._strip_protocol(path).rstrip("/")
        entries: dict[str, dict[str, Any]] = {}
        for name, info in self.find(path, detail=True).items():
            head, slash, _rest = name[len(path) + 1 :].partition("/")
            folder = {"name": f"{path}/{head}", "size": 0, "type": "directory"}
            entries[f"{path}/{head}"] = folder if slash else info
        return list(entries.values()) if detail else sorted(entries)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if mode != "rb":
            raise NotImplementedError("objects are written whole, with pipe_file")
        return _StoredObject(self, path, mode, block_size or 4 * 2**20, **options)


class S3FileSystem(_ObjectStore):
    """S3 and whatever speaks like it. Without credentials, requests are anonymous, for public buckets."""

    protocol = ("s3",)

    def __init__(self, endpoint: str | None = None, keys: tuple[str, str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._endpoint, self._keys = endpoint, keys

    def _identity(self) -> Any:
        return (self._endpoint, self._keys)

    def _connect(self) -> Any:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        key, secret = self._keys or (None, None)
        session = boto3.session.Session(aws_access_key_id=key, aws_secret_access_key=secret)
        config = Config(
            retries={"max_attempts": _ATTEMPTS, "mode": "standard"},
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            max_pool_connections=32,
        )
        if session.get_credentials() is None:
            config = config.merge(Config(signature_version=UNSIGNED))
        endpoint = self._endpoint or os.environ.get("S3_ENDPOINT_URL")
        return session.client("s3", endpoint_url=endpoint, config=config)

    def objects(self, bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield key and size of every object whose key begins with ``prefix``."""
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            yield from ((entry["Key"], entry["Size"]) for entry in page.get("Contents", ()))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name and size.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _missing_as_file_not_found():
            size = self.client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        return {"name": path, "size": size, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Read an object, or the bytes from ``start`` up to ``end``."""
        bucket, key = _split(self._strip_protocol(path))
        if start is not None and end is not None and start >= end:
            return b""
        wanted = {} if start is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        for attempt in range(_ATTEMPTS):  # botocore repeats requests, but not bodies that break off
            try:
                with _missing_as_file_not_found():
                    return self.client.get_object(Bucket=bucket, Key=key, **wanted)["Body"].read()
            except _broken_bodies():
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write an object whole; it appears when all of it has arrived."""
        bucket, key = _split(self._strip_protocol(path))
        self.client.put_object(Bucket=bucket, Key=key, Body=value)

    def _rm(self, path: str) -> None:
        bucket, key = _split(self._strip_protocol(path))
        self.client.delete_object(Bucket=bucket, Key=key)

    rm_file = _rm


class GCSFileSystem(_ObjectStore):
    """Google Cloud Storage with a service account, or anonymously where there is none."""

    protocol = ("gs", "gcs")

    def _connect(self) -> Any:
        from google.auth import default
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud.storage import Client

        try:
            credentials, project = default()
        except DefaultCredentialsError:
            return Client.create_anonymous_client()
        return Client(credentials=credentials, project=project or "none")

    def objects(self, bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield key and size of every object whose key begins with ``prefix``."""
        yield from ((blob.name, blob.size) for blob in self.client.list_blobs(bucket, prefix=prefix))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name and size.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        blob = self.client.bucket(bucket).get_blob(key)
        if blob is None:
            raise FileNotFoundError(path)
        return {"name": path, "size": blob.size, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Read an object, or the bytes from ``start`` up to ``end``."""
        from google.api_core.exceptions import NotFound

        path = self._strip_protocol(path)
        bucket, key = _split(path)
        if start is not None and end is not None and start >= end:
            return b""
        try:
            blob = self.client.bucket(bucket).blob(key)
            return blob.download_as_bytes(start=start, end=None if end is None else end - 1)
        except NotFound:
            raise FileNotFoundError(path) from None

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write an object whole; it appears when all of it has arrived."""
        bucket, key = _split(self._strip_protocol(path))
        self.client.bucket(bucket).blob(key).upload_from_string(value, content_type="application/octet-stream")

    def _rm(self, path: str) -> None:
        bucket, key = _split(self._strip_protocol(path))
        self.client.bucket(bucket).blob(key).delete()

    rm_file = _rm


def file_system(scheme: str) -> AbstractFileSystem:
    """Return the file system of an address's scheme: the two stores above, or whatever fsspec knows."""
    import fsspec

    if scheme == "s3":
        return S3FileSystem()
    if scheme in ("gs", "gcs"):
        if "GCS_KEY" in os.environ and "GCS_SECRET" in os.environ:  # interoperability keys: Google speaks S3
            keys = (os.environ["GCS_KEY"], os.environ["GCS_SECRET"])
            return S3FileSystem(endpoint="https://storage.googleapis.com", keys=keys)
        return GCSFileSystem()
    return fsspec.filesystem(scheme)


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key


def _broken_bodies() -> tuple[type[Exception], ...]:
    from botocore.exceptions import ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError
    from urllib3.exceptions import HTTPError

    return (ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError, HTTPError)


class _missing_as_file_not_found:
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and response.get("Error", {}).get("Code") in ("404", "NoSuchKey"):
            raise FileNotFoundError("no such object") from None
