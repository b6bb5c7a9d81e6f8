"""Google Cloud Storage by its JSON API, with Application Default Credentials, or without for public buckets.

With `GCS_KEY` and `GCS_SECRET`, interoperability keys, Google is asked as an S3 store. `STORAGE_EMULATOR_HOST` names
another server. Google's own client hides what failed and repeats by itself; only its sessions are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from composer_path.storage.errors import Fault, broken_off, named, passing, status_fault
from composer_path.storage.s3 import S3Store
from composer_path.storage.store import CONNECT_SECONDS, STALL_SECONDS, Attempts, Store, client_of, pieces, wanted_range
from composer_path.storage.transfer import Answer


def google_store(url: str) -> S3Store | GoogleStore:
    """Return the store of `gs://bucket/folder`."""
    if "GCS_KEY" in os.environ and "GCS_SECRET" in os.environ:
        keys = {"aws_access_key_id": os.environ["GCS_KEY"], "aws_secret_access_key": os.environ["GCS_SECRET"]}
        return S3Store(url, "https://storage.googleapis.com", region_name="auto", **keys)
    return GoogleStore(url)


class GoogleStore(Store):
    """A folder of a bucket of Google's."""

    takes_files = True

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every object."""
        start = self.key("")
        found: dict[str, int] = {}
        wanted = {"prefix": start, "fields": "items(name,size),nextPageToken"}
        while True:
            with self._asked("GET", "/storage/v1", params=wanted) as answer:
                page = answer.json()
            found |= {item["name"][len(start) :]: int(item["size"]) for item in page.get("items", ())}
            if "nextPageToken" not in page:
                return found
            wanted["pageToken"] = page["nextPageToken"]

    def size(self, name: str) -> int:
        """Return an object's size."""
        with self._asked("GET", "/storage/v1", name) as answer:
            return int(answer.json()["size"])

    def write(self, name: str, data: bytes) -> None:
        """Write an object whole; it appears when all of it has arrived."""
        wanted = {"uploadType": "media", "name": self.key(name)}
        headers = {"Content-Type": "application/octet-stream"}
        with self._asked("POST", "/upload/storage/v1", params=wanted, data=data, headers=headers):
            return

    def write_file(self, name: str, path: Path, attempts: Attempts) -> None:
        """Write an object from a file, which is sent piece by piece."""
        attempts(self._send_file, name, path)

    def _send_file(self, name: str, path: Path) -> None:
        wanted = {"uploadType": "media", "name": self.key(name)}
        headers = {"Content-Type": "application/octet-stream"}
        with (
            path.open("rb") as data,
            self._asked("POST", "/upload/storage/v1", params=wanted, data=data, headers=headers),
        ):
            return

    def delete(self, name: str) -> None:
        """Delete an object."""
        with self._asked("DELETE", "/storage/v1", name):
            return

    @contextmanager
    def ask(self, name: str, start: int, end: int | None, stall: float) -> Iterator[Answer]:
        """Ask for an object, or for its bytes from `start` up to `end`."""
        headers = {"Accept-Encoding": "gzip", **wanted_range(start, end)}  # as it is stored
        request: dict[str, Any] = {"params": {"alt": "media"}, "headers": headers, "stream": True}
        with self._asked("GET", "/download/storage/v1", name, stall, **request) as answer:
            length = answer.headers.get("Content-Length")
            content_range = answer.headers.get("Content-Range")
            yield Answer(content_range, None if length is None else int(length), pieces(answer.raw))

    @contextmanager
    def _asked(self, verb: str, api: str, name: str = "", stall: float = STALL_SECONDS, **more: Any) -> Iterator[Any]:
        """The answer to a request about an object, or the bucket; errors become faults."""
        from google.auth.exceptions import GoogleAuthError, TransportError
        from requests.exceptions import RequestException
        from urllib3.exceptions import HTTPError

        more["timeout"] = (min(CONNECT_SECONDS, stall), stall)
        try:
            session, endpoint = client_of("google", _connect)
            of = f"/{quote(self.key(name), safe='')}" if name else ""
            with session.request(verb, f"{endpoint}{api}/b/{self.bucket}/o{of}", **more) as answer:
                if not answer.ok:
                    raise status_fault(answer.status_code)
                yield answer
        except TransportError as error:  # the token couldn't be fetched
            raise passing("unreachable", named(error)) from None
        except GoogleAuthError as error:
            raise Fault("forbidden", named(error), "check the credentials, see docs/streaming.md") from None
        except (RequestException, HTTPError, ConnectionError, TimeoutError) as error:
            raise broken_off(error) from None


def _connect() -> tuple[Any, str]:
    """A session with the user's credentials, or without for public buckets; and the store's address."""
    import google.auth
    from google.auth.credentials import AnonymousCredentials
    from google.auth.transport.requests import AuthorizedSession

    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
    except google.auth.exceptions.DefaultCredentialsError:
        credentials = AnonymousCredentials()
    domain = getattr(credentials, "universe_domain", "googleapis.com")
    endpoint = os.environ.get("STORAGE_EMULATOR_HOST", f"https://storage.{domain}").rstrip("/")
    return AuthorizedSession(credentials), endpoint if "://" in endpoint else f"http://{endpoint}"
