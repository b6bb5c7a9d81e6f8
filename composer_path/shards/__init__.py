"""Sets of MDS shards: written, read, looked into."""
