"""Messages about places hold no secret."""

from __future__ import annotations

import pytest

from composer_path.storage.errors import StorageError, explained, named, shown, status_fault
from composer_path.stream.error import StreamError


@pytest.mark.parametrize("name", ["GCS_SECRET", "GCS_KEY", "AWS_SESSION_TOKEN", "SFTP_PASSWORD", "azure_storage_key"])
@pytest.mark.parametrize("secret", ["sesame", "a/long+one" * 9])
def test_no_message_has_a_secret_of_the_environment(name: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, secret)
    monkeypatch.setenv("OTHER_SECRET", secret[:6])  # the beginning of it, which must not leave the rest
    with pytest.raises(StorageError) as caught, explained("gs://bucket/set", "read"):
        raise PermissionError(f"signed with {secret}, which is wrong")
    text = "signed with ***, which is wrong"
    assert str(caught.value) == (
        f"gs://bucket/set: can't read it, found PermissionError: {text}; check address and rights"
    )
    assert named(KeyError(f"signed with {secret}, which is wrong")) == f"KeyError ('{text}')"
    assert secret not in str(StreamError.of("", "internal", "gs://bucket/set", f"found {secret}", "report it"))


def test_a_short_word_of_the_environment_stays_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "wrong")
    assert named(ValueError("wrong size")) == "ValueError (wrong size)"


def test_an_address_is_shown_without_its_password() -> None:
    assert shown("sftp://me:pass@word@host/set?token=abc") == "sftp://host/set"
    assert shown("/data/a@b?") == "/data/a@b?"
    assert "word" not in named(OSError("no way to sftp://me:pass@word@host/set"))


@pytest.mark.parametrize(
    ("status", "rule", "passes"),
    [
        (400, "refused", False),
        (401, "forbidden", False),
        (403, "forbidden", False),
        (404, "missing", False),
        (408, "unreachable", True),
        (429, "unreachable", True),
        (500, "unreachable", True),
        (503, "unreachable", True),
    ],
)
def test_what_an_answer_means(status: int, rule: str, passes: bool) -> None:
    fault = status_fault(status)
    assert (fault.rule, fault.transient, fault.status) == (rule, passes, status)
