"""Layouts of public record files: each is read into plain records, which then go through every check."""
