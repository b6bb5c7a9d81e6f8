"""What processes tell each other of a failure arrives whole, or shortened, but never broken."""

from __future__ import annotations

import os
import pickle

import pytest

from composer_path.stream.error import FailureNote, StreamError

FIELDS = ("shard", "rule", "where", "fix")


@pytest.mark.parametrize("length", [1, 5000])
def test_the_first_failure_is_read_as_it_was_noted_however_long_it_is(length: int) -> None:
    note = FailureNote(f"{os.getpid()}_test_failure")
    note.clear()
    assert not note.is_set() and note.read() is None
    error = StreamError.of("\U0001f52c" * length, "missing", "/data/" + "\U0001f52c" * length, "no file", "copy it")
    note.write(error)
    note.write(StreamError("a later one"))
    found = note.read()
    assert found is not None and str(error).startswith(str(found)) and len(str(found)) >= min(len(str(error)), 60)
    assert (found.rule, found.fix) == ("missing", "copy it")
    assert error.shard.startswith(found.shard) and error.where.startswith(found.where)


def test_a_failure_is_sent_to_other_ranks_with_all_that_it_says() -> None:
    error = StreamError.of("index.json", "missing", "s3://bucket/set", "there is no such file", "convert again")
    found = pickle.loads(pickle.dumps(error))
    assert str(found) == str(error)
    assert [getattr(found, field) for field in FIELDS] == [getattr(error, field) for field in FIELDS]
