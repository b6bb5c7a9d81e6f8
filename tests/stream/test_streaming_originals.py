"""Methods of Streaming that ours replace and follow closely: a change of theirs asks for a look at ours."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import pytest
from streaming import Stream, StreamingDataset
from streaming.base.shared import prefix

# As of mosaicml-streaming 0.13.0. When one differs, compare it with ours in composer_path/stream,
# take over what matters, and write the new number here.
ORIGINALS = {
    (StreamingDataset, "prepare_shard"): "0aebbfc3c71ca41a",
    (StreamingDataset, "get_item"): "0082820df3629b50",
    (StreamingDataset, "on_exception"): "29b835084a0b6d8a",
    (StreamingDataset, "_each_sample_id"): "78e2aed24cff2607",
    (StreamingDataset, "_prepare_thread"): "51ca7defcb598b6d",
    (StreamingDataset, "_ready_thread"): "7d83095a9f36423e",
    (StreamingDataset, "__iter__"): "6457c4cfbae05998",
    (StreamingDataset, "_resume"): "308faccca0ea5c95",
    (StreamingDataset, "_get_work"): "b44aef7d7bfdc6f2",
    (StreamingDataset, "state_dict"): "f43fd0324bbaddc3",
    (StreamingDataset, "load_state_dict"): "05a5e2b2930ea878",
    (prefix, "get_shm_prefix"): "df1d1d0a0cbbac91",
    (prefix, "_check_and_find"): "26f64ff58f0f5198",
    (Stream, "get_shards"): "6d6f4b3a6363270a",
    (Stream, "prepare_shard"): "702a0c19a63e5519",
    (Stream, "_prepare_shard_part"): "4ae2d311472db8ce",
}


@pytest.mark.parametrize(("owner", "name"), ORIGINALS, ids=[f"{owner.__name__}.{name}" for owner, name in ORIGINALS])
def test_what_is_replaced_is_what_it_was_written_after(owner: Any, name: str) -> None:
    source = inspect.getsource(getattr(owner, name)).encode()
    assert hashlib.sha256(source).hexdigest()[:16] == ORIGINALS[owner, name]
