"""A record and what becomes of it: its rules, its prompt, its tokens."""
