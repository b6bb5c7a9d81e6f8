"""Tests that read shards give Streaming's shared memory back."""

from streaming_memory import _close_shared_memory  # noqa: F401 (a fixture)
