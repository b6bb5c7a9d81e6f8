"""Reading shards while training, so that a sample is never lost in silence."""
