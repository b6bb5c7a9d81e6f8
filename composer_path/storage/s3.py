"""S3 and whatever speaks like it, through boto3.

Credentials, region and profile come from where boto3 looks for them, the endpoint from `S3_ENDPOINT_URL`. Without
credentials requests are anonymous, for public buckets; the buckets that `MOSAICML_STREAMING_AWS_REQUESTER_PAYS` names
are asked at one's own cost. s3fs isn't used: it ties botocore to other versions than boto3 does, so that pip may
install one of 2020 in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer_path.storage.errors import Fault, broken_off, named, status_fault
from composer_path.storage.store import CONNECT_SECONDS, STALL_SECONDS, Attempts, Store, client_of, pieces, wanted_range
from composer_path.storage.transfer import Answer

_PART_BYTES = 64 * 2**20  # of 10,000 at most that S3 takes of an object


class S3Store(Store):
    """A folder of an S3 bucket; an endpoint and keywords of a boto3 session go before what boto3 finds."""

    takes_files = True

    def __init__(self, url: str, endpoint: str | None = None, **session: str) -> None:
        super().__init__(url)
        self._endpoint, self._session = endpoint, session
        payers = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
        self._request = {"Bucket": self.bucket}
        if self.bucket in [name.strip() for name in payers]:
            self._request["RequestPayer"] = "requester"

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every object."""
        start = self.key("")
        with self._asked() as client:
            pages = client.get_paginator("list_objects_v2").paginate(**self._request, Prefix=start)
            return {entry["Key"][len(start) :]: entry["Size"] for page in pages for entry in page.get("Contents", ())}

    def size(self, name: str) -> int:
        """Return an object's size."""
        with self._asked() as client:
            return client.head_object(**self._request, Key=self.key(name))["ContentLength"]

    def write(self, name: str, data: bytes) -> None:
        """Write an object whole; it appears when all of it has arrived."""
        with self._asked() as client:
            client.put_object(**self._request, Key=self.key(name), Body=data)

    def write_file(self, name: str, path: Path, attempts: Attempts) -> None:
        """Write an object from a file, a large one in parts; it appears with the last."""
        if path.stat().st_size <= _PART_BYTES:
            attempts(self.write, name, path.read_bytes())
            return
        upload = attempts(self._begin, name)
        with path.open("rb") as file:
            pieces = iter(lambda: file.read(_PART_BYTES), b"")
            parts = [attempts(self._write_part, name, upload, *numbered) for numbered in enumerate(pieces, start=1)]
        attempts(self._finish, name, upload, parts)

    def _begin(self, name: str) -> str:
        """Begin an object that is written in parts; returns the word for it. It appears with `_finish`."""
        with self._asked() as client:
            return client.create_multipart_upload(**self._request, Key=self.key(name))["UploadId"]

    def _write_part(self, name: str, upload: str, number: int, data: bytes) -> str:
        """Write a part, counted from 1, of 5 MB at least but for the last; returns the word for it."""
        with self._asked() as client:
            part = {"Key": self.key(name), "UploadId": upload, "PartNumber": number}
            return client.upload_part(**self._request, **part, Body=data)["ETag"]

    def _finish(self, name: str, upload: str, parts: Sequence[str]) -> None:
        """Let the object appear."""
        tags = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(parts, start=1)]
        with self._asked() as client:
            whole = {"Key": self.key(name), "UploadId": upload, "MultipartUpload": {"Parts": tags}}
            client.complete_multipart_upload(**self._request, **whole)

    def delete(self, name: str) -> None:
        """Delete an object."""
        with self._asked() as client:
            client.delete_object(**self._request, Key=self.key(name))

    @contextmanager
    def ask(self, name: str, start: int, end: int | None, stall: float) -> Iterator[Answer]:
        """Ask for an object, or for its bytes from `start` up to `end`."""
        with self._asked(stall) as client:
            answer = client.get_object(**self._request, **wanted_range(start, end), Key=self.key(name))
            # botocore's own iterator waits for whole chunks, past any bound; an older or a newer one may have no other.
            raw = getattr(answer["Body"], "_raw_stream", None)
            body = answer["Body"].iter_chunks(1 << 14) if raw is None else pieces(raw)
            yield Answer(answer.get("ContentRange"), answer["ContentLength"], body)

    def _connect(self, stall: float) -> tuple[Any, bool]:
        """A client, and whether it asks without credentials."""
        from boto3.session import Session
        from botocore import UNSIGNED
        from botocore.config import Config

        session = Session(**self._session)
        unsigned = session.get_credentials() is None
        config = Config(
            connect_timeout=min(CONNECT_SECONDS, stall),
            read_timeout=stall,
            retries={"total_max_attempts": 1},  # who asks counts and waits
            max_pool_connections=32,
            **({"signature_version": UNSIGNED} if unsigned else {}),
        )
        endpoint = self._endpoint or os.environ.get("S3_ENDPOINT_URL")
        return session.client("s3", endpoint_url=endpoint, config=config), unsigned

    @contextmanager
    def _asked(self, stall: float = STALL_SECONDS) -> Iterator[Any]:
        """The client; its errors become faults."""
        from botocore import exceptions as boto
        from urllib3.exceptions import HTTPError

        broken = (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, boto.CredentialRetrievalError)
        unsigned = False
        try:
            who = (self._endpoint, stall, *self._session.items())
            client, unsigned = client_of(who, lambda: self._connect(stall))
            yield client
        except boto.ClientError as error:
            status = int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))
            code = str(error.response.get("Error", {}).get("Code", ""))
            raise status_fault(status, "" if code == str(status) else code, unsigned) from None
        except (*broken, HTTPError, ConnectionError, TimeoutError) as error:
            raise broken_off(error) from None
        except (boto.BotoCoreError, ValueError) as error:  # such as an endpoint that is no URL
            raise Fault("endpoint", named(error), "check S3_ENDPOINT_URL and the bucket's name") from None
