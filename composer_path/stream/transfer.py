"""One attempt to bring a file from a folder or a bucket, bounded in time, with a plain word for what failed.

Streaming's own downloaders can't be used for this: an answer 400 sends theirs into endless recursion, a dead
connection keeps it for half an hour, Google's errors are swallowed, and public buckets need credentials.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlparse

from composer_path.stream.error import without_password

_CHUNK = 1 << 20
_CONNECT_SECONDS = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Fault(Exception):
    """Why an attempt failed.

    Args:
        rule: A short slug.
        found: What was found.
        fix: What to do.
        transient: Another attempt may succeed.
    """

    def __init__(self, rule: str, found: str, fix: str, transient: bool = False) -> None:
        super().__init__(rule, found, fix, transient)
        self.rule, self.found, self.fix, self.transient = rule, found, fix, transient


class Stopped(Exception):
    """Another process failed, so this download isn't wanted any more."""


@dataclass
class Limits:
    """What bounds an attempt.

    Args:
        stall: Seconds without a byte.
        deadline: Moment of `time.monotonic()`.
        stopped: Asked now and then.
    """

    stall: float
    deadline: float
    stopped: Callable[[], bool] = lambda: False


class _Part:
    """The unfinished file; stops an attempt whose time is over, and tells the disk's faults from the network's."""

    def __init__(self, file: BinaryIO, limits: Limits) -> None:
        self.file, self.limits = file, limits

    def write(self, data: bytes) -> int:
        if self.limits.stopped():
            raise Stopped
        if time.monotonic() > self.limits.deadline:
            raise Fault("too-slow", f"{self.file.tell():,} bytes had arrived", _SLOW, transient=True)
        try:
            return self.file.write(data)
        except OSError as error:
            raise cache_fault(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


_SLOW = "raise fault_timeout, or convert with a smaller --size-limit"
_REACH = "check the network and the endpoint, or raise fault_timeout"


def cache_fault(error: OSError) -> Fault:
    """What the cache's disk refused."""
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in _FULL:
        return Fault("cache-full", reason, "free some space, set cache_limit, or choose another folder as local")
    return Fault("cache-not-writable", reason, "choose a folder as local that this user can write to")


class Transfer:
    """Brings files; keeps its connection from file to file, one a process.

    Args:
        remote: Folder, or URL of the set.
    """

    def __init__(self, remote: str) -> None:
        self.remote = remote
        self._client: Any = None
        self._client_key: Any = None
        self._unsigned = False

    def __getstate__(self) -> dict[str, Any]:
        """Connections don't travel."""
        return self.__dict__ | {"_client": None, "_client_key": None}

    def fetch(self, path: str, part: Path, limits: Limits) -> None:
        """One attempt to write a file of the set to `part`; goes on where a cut transfer stopped, where possible.

        Raises:
            Fault: It failed.
            Stopped: It was called off.
        """
        url = f"{self.remote.rstrip('/')}/{path}"
        scheme = urlparse(self.remote).scheme
        bring = {"": self._copy, "s3": self._from_s3, "gs": self._from_gs}.get(scheme, self._from_elsewhere)
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab" if scheme in ("s3", "gs") else "wb") as file:
                bring(url, _Part(file, limits), limits)
        except OSError as error:
            raise cache_fault(error) from None

    def _copy(self, url: str, part: _Part, limits: Limits) -> None:
        try:
            source = open(url, "rb")  # noqa: SIM115 (its errors and the cache's must be told apart)
        except OSError as error:
            raise _source_fault(error) from None
        with source:
            while True:
                try:
                    data = source.read(_CHUNK)
                except OSError as error:
                    raise _source_fault(error) from None
                if not data:
                    return
                part.write(data)

    def _s3_client(self, limits: Limits, endpoint: str | None, keys: dict[str, str]) -> Any:
        key = (os.getpid(), self._unsigned, limits.stall)
        if self._client is None or self._client_key != key:
            from boto3.session import Session
            from botocore import UNSIGNED
            from botocore.config import Config

            config = Config(
                connect_timeout=min(_CONNECT_SECONDS, limits.stall),
                read_timeout=limits.stall,
                retries={"total_max_attempts": 1},  # we count and wait ourselves
                **({"signature_version": UNSIGNED} if self._unsigned else {}),
            )
            self._client = Session().client("s3", config=config, endpoint_url=endpoint, **keys)
            self._client_key = key
        return self._client

    def _from_s3(self, url: str, part: _Part, limits: Limits) -> None:
        self._from_s3_store(url, part, limits, os.environ.get("S3_ENDPOINT_URL"), {})

    def _from_s3_store(self, url: str, part: _Part, limits: Limits, endpoint: str | None, keys: dict[str, str]) -> None:
        from botocore import exceptions as boto
        from urllib3.exceptions import HTTPError

        place = urlparse(url)
        request: dict[str, Any] = {"Bucket": place.netloc, "Key": place.path.lstrip("/")}
        payers = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
        if place.netloc in [name.strip() for name in payers]:
            request["RequestPayer"] = "requester"
        arrived = part.tell()
        if arrived:
            request["Range"] = f"bytes={arrived}-"
        try:
            answer = self._s3_client(limits, endpoint, keys).get_object(**request)
            if not _goes_on(answer.get("ContentRange"), arrived):
                part.truncate(0)
                arrived = 0
            whole = arrived + answer["ContentLength"]
            for data in _as_they_come(answer["Body"]):
                part.write(data)
            if part.tell() < whole:
                raise Fault("cut", f"{part.tell():,} of {whole:,} bytes arrived", _REACH, transient=True)
        except boto.NoCredentialsError:  # a public bucket is read without
            self._unsigned = True
            self._from_s3_store(url, part, limits, endpoint, keys)
        except boto.ClientError as error:
            if error.response["ResponseMetadata"].get("HTTPStatusCode") == 416:  # the part is as long as the file
                part.truncate(0)
            raise _s3_fault(error, self._unsigned) from None
        except (
            boto.ConnectionError,
            boto.HTTPClientError,
            boto.IncompleteReadError,
            boto.CredentialRetrievalError,
            HTTPError,
            ConnectionError,
            TimeoutError,
        ) as error:
            raise _broken_off(error) from None
        except (boto.BotoCoreError, ValueError) as error:  # such as an endpoint that is no URL
            raise Fault("endpoint", _name(error), "check S3_ENDPOINT_URL and the bucket's name") from None

    def _from_gs(self, url: str, part: _Part, limits: Limits) -> None:
        if "GCS_KEY" in os.environ and "GCS_SECRET" in os.environ:
            part.truncate(0)
            keys = {"aws_access_key_id": os.environ["GCS_KEY"], "aws_secret_access_key": os.environ["GCS_SECRET"]}
            endpoint = "https://storage.googleapis.com"
            return self._from_s3_store(url, part, limits, endpoint, {**keys, "region_name": "auto"})
        from google.auth.exceptions import GoogleAuthError, TransportError
        from requests.exceptions import RequestException
        from urllib3.exceptions import HTTPError

        place = urlparse(url)
        arrived = part.tell()
        headers = {"Accept-Encoding": "gzip"} | ({"Range": f"bytes={arrived}-"} if arrived else {})  # as it is stored
        timeout = (min(_CONNECT_SECONDS, limits.stall), limits.stall)
        try:
            session, endpoint = self._gs_session()
            address = f"{endpoint}/download/storage/v1/b/{place.netloc}/o/{quote(place.path.lstrip('/'), safe='')}"
            with session.get(f"{address}?alt=media", headers=headers, timeout=timeout, stream=True) as answer:
                if answer.status_code == 416:  # the part is as long as the file
                    part.truncate(0)
                if not answer.ok:
                    raise _status_fault(answer.status_code, "")
                if not _goes_on(answer.headers.get("Content-Range"), arrived):
                    part.truncate(0)
                    arrived = 0
                whole = arrived + int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
                for data in _pieces(answer.raw):
                    part.write(data)
            if whole is not None and part.tell() < whole:
                raise Fault("cut", f"{part.tell():,} of {whole:,} bytes arrived", _REACH, transient=True)
        except TransportError as error:  # the token couldn't be fetched
            raise Fault("unreachable", _name(error), _REACH, transient=True) from None
        except GoogleAuthError as error:
            raise Fault("forbidden", _name(error), "check the credentials, see docs/streaming.md") from None
        except (RequestException, HTTPError, ConnectionError, TimeoutError) as error:
            raise _broken_off(error) from None
        return None

    def _gs_session(self) -> tuple[Any, str]:
        """A session with the user's credentials, or without for public buckets; and the store's address."""
        if self._client is None or self._client_key != os.getpid():
            import google.auth
            from google.auth.credentials import AnonymousCredentials
            from google.auth.transport.requests import AuthorizedSession

            try:
                credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_only"])
            except google.auth.exceptions.DefaultCredentialsError:
                credentials = AnonymousCredentials()
            domain = getattr(credentials, "universe_domain", "googleapis.com")
            endpoint = os.environ.get("STORAGE_EMULATOR_HOST", f"https://storage.{domain}").rstrip("/")
            endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
            self._client = (AuthorizedSession(credentials), endpoint)
            self._client_key = os.getpid()
        return self._client

    def _from_elsewhere(self, url: str, part: _Part, limits: Limits) -> None:
        """Stores that Streaming knows and we don't: its downloader, in a thread that is left behind if it hangs."""
        from streaming.base.storage import CloudDownloader

        target = f"{part.name}.streaming"
        failure: list[BaseException] = []

        def download() -> None:
            try:
                CloudDownloader.direct_download(url, target, limits.stall)
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=download, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            if limits.stopped():
                raise Stopped
            if time.monotonic() > limits.deadline:
                raise Fault("too-slow", "the download hadn't ended", _SLOW, transient=True)
        try:
            if failure:
                missing = isinstance(failure[0], FileNotFoundError)
                rule = "missing" if missing else "unreachable"
                raise Fault(rule, _name(failure[0]), "check the place and the rights", transient=not missing)
            os.replace(target, part.name)
        finally:
            Path(target).unlink(missing_ok=True)


def _goes_on(content_range: str | None, arrived: int) -> bool:
    """Whether an answer has the bytes after those that arrived, and not all of them again.

    Its range tells: servers are about that send a part with the status 200 of a whole.
    """
    return (content_range or "").startswith(f"bytes {arrived}-")


def _as_they_come(body: Any) -> Iterator[bytes]:
    """Bytes as soon as they are there: botocore's own iterator waits for whole chunks, past any bound."""
    raw: Any = getattr(body, "_raw_stream", None)
    if raw is None:  # an older or a newer botocore
        yield from body.iter_chunks(1 << 14)
    else:
        yield from _pieces(raw)


def _pieces(raw: Any) -> Iterator[bytes]:
    """Of an answer of urllib3; as they were sent, not unpacked."""
    read = functools.partial(raw.read1, _CHUNK) if hasattr(raw, "read1") else functools.partial(raw.read, 1 << 14)
    while data := read(decode_content=False):
        yield data


def _broken_off(error: Exception) -> Fault:
    """A connection that failed, or ended before the file did."""
    text = f"{type(error).__name__} {error}"
    return Fault("cut" if "IncompleteRead" in text else "unreachable", _name(error), _REACH, transient=True)


def _source_fault(error: OSError) -> Fault:
    """What the folder that stands for a bucket refused."""
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Fault("missing", "there is no such file", "check remote, or convert the data again")
    if isinstance(error, PermissionError):
        return Fault("forbidden", reason, "ask for the right to read it")
    return Fault("unreachable", reason, _REACH, transient=True)  # a network file system that hiccups


def _s3_fault(error: Any, unsigned: bool) -> Fault:
    status = int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", status))
    return _status_fault(status, code, unsigned)


def _status_fault(status: int, code: str, unsigned: bool = False) -> Fault:
    """What an answer other than 2xx means."""
    found = f"answer {status} {code}".rstrip()
    if status >= 500 or status in (408, 416, 429) or code in ("RequestTimeout", "SlowDown", "Throttling"):
        return Fault("unreachable", found, _REACH, transient=True)
    if status == 404:
        return Fault("missing", found, "check remote, or convert the data again")
    if status in (401, 403):
        without = " (none were found, so the bucket was asked without)" if unsigned else ""
        return Fault("forbidden", found, f"check the credentials{without} and the bucket's rights")
    return Fault("refused", found, "check the credentials, the region and the endpoint")


def _name(error: BaseException) -> str:
    """A foreign error in a few words; its address may hold a password."""
    text = without_password(str(error)).splitlines()
    return f"{type(error).__name__}{f' ({text[0][:200]})' if text else ''}"
