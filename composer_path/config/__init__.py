"""The YAML: reading it, what it may say, and what must be there before a run starts."""
