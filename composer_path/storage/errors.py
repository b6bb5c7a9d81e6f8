"""What goes wrong with a place, told apart, in words that hold no secret."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Variables of the environment with one of these in their name hold what must not be shown.
_SECRET_NAMES = ("KEY", "SECRET", "TOKEN", "PASSW")
NO_SUCH_RANGE = 416
_MIN_SECRET = 6  # shorter values are words that messages are made of
_MISSING = "check remote, or convert the data again"


class StorageError(OSError):
    """A place can't be reached, read or written; not the fault of any record."""


@dataclass(eq=False)
class Fault(Exception):
    """Why an attempt failed."""

    rule: str  # a short slug: missing, forbidden, unreachable, cut, ...
    found: str
    fix: str  # for who trains
    transient: bool = False  # another attempt may succeed
    status: int = 0  # of a server's answer, if it was one


class Stopped(Exception):
    """Another process failed, so this download isn't wanted any more."""


def without_password(text: str) -> str:
    """Take the user and password out of the addresses in a text."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def shown(url: str | Path) -> str:
    """Return an address as it may be shown: without a name and password, and what follows a question mark."""
    text = os.fspath(url)
    return without_password(text).partition("?")[0] if "://" in text else text


def masked(text: str) -> str:
    """Take every secret of the environment, and passwords in addresses, out of a text."""
    secrets = {value for name, value in os.environ.items() if any(word in name.upper() for word in _SECRET_NAMES)}
    for secret in sorted(secrets, key=len, reverse=True):  # one may be the beginning of another
        if len(secret) >= _MIN_SECRET:
            text = text.replace(secret, "***")
    return without_password(text)


def named(error: BaseException) -> str:
    """Name a foreign error in a few words."""
    lines = masked(str(error)).splitlines()
    return f"{type(error).__name__}{f' ({lines[0][:200]})' if lines else ''}"


@contextmanager
def explained(url: str, verb: str) -> Iterator[None]:
    """Turn whatever a store's client raises into one error that names the place and holds no secret."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except Exception as error:  # every client has its own errors
        found = masked(error.found if isinstance(error, Fault) else f"{type(error).__name__}: {error}")
        raise StorageError(f"{shown(url)}: can't {verb} it, found {found[:500]}; check address and rights") from None


def status_fault(status: int, code: str = "", unsigned: bool = False) -> Fault:
    """What a server's answer other than 2xx means; `code` is the store's own word for it."""
    found = f"answer {status} {code}".rstrip()
    if status >= 500 or status in (408, NO_SUCH_RANGE, 429) or code in ("RequestTimeout", "SlowDown", "Throttling"):
        return passing("unreachable", found, status)
    if status == 404:
        return Fault("missing", found, _MISSING, status=status)
    if status in (401, 403):
        without = " (none were found, so the bucket was asked without)" if unsigned else ""
        return Fault("forbidden", found, f"check the credentials{without} and the bucket's rights", status=status)
    return Fault("refused", found, "check the credentials, the region and the endpoint", status=status)


def passing(rule: str, found: str, status: int = 0) -> Fault:
    """A fault that may pass: `unreachable`, a place that doesn't answer; `cut`, an answer that ended too early."""
    return Fault(rule, found, "check the network and the endpoint, or raise fault_timeout", True, status)


def broken_off(error: Exception) -> Fault:
    """A connection that failed, or ended before the object did."""
    return passing("cut" if "IncompleteRead" in f"{type(error).__name__} {error}" else "unreachable", named(error))


def source_fault(error: OSError) -> Fault:
    """What a folder that is read refused."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Fault("missing", "there is no such file", _MISSING)
    if isinstance(error, PermissionError):
        return Fault("forbidden", _reason(error), "ask for the right to read it")
    return passing("unreachable", _reason(error))  # a network file system that hiccups


def cache_fault(error: OSError) -> Fault:
    """What the cache's disk refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = "free some space, set cache_limit, or choose another folder as local"
        return Fault("cache-full", _reason(error), fix)
    return Fault("cache-not-writable", _reason(error), "choose a folder as local that this user can write to")


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else type(error).__name__
