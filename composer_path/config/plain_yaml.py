"""What a YAML's text may hold, seen before anything is built of it: plain values, not too deep, nor without end."""

from __future__ import annotations

import yaml

MAX_DEPTH = 32  # levels; our own have 5
MAX_VALUES = 10_000  # in all, with those of aliases; our own have 100


def check_plain(text: str) -> None:
    """Refuse tags (of which some run code, and some crash the reader), deep nesting, and aliases that never end.

    Raises:
        ValueError: One line.
        yaml.YAMLError: It is no YAML.
    """
    anchors: dict[str, tuple[int, int]] = {}  # name -> values and levels below it
    stack: list[tuple[str | None, int, int]] = [(None, 0, 0)]  # of the collections that are open
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if tag := getattr(event, "tag", None):
            short = tag.replace("tag:yaml.org,2002:", "!!")
            raise ValueError(f"found the tag {short}; only plain values are read: remove it, or put text into quotes")
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, 1, 1))
        elif isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent):
            anchor, values, levels = getattr(event, "anchor", None), 1, 0
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, values, levels = stack.pop()
            elif isinstance(event, yaml.AliasEvent) and event.anchor is not None:
                if anchor in [name for name, _, _ in stack]:
                    raise ValueError(f"found the alias *{anchor} inside of what it stands for; write out what is meant")
                values, levels = anchors.get(str(anchor), (1, 0))
            if anchor is not None:
                anchors[anchor] = values, levels
            name, so_far, deepest = stack[-1]
            stack[-1] = name, so_far + values, max(deepest, levels + 1)
        _, values, levels = stack[-1]
        if len(stack) - 2 + levels > MAX_DEPTH:
            raise ValueError(f"is nested more than {MAX_DEPTH} levels deep; take levels away")
        if values > MAX_VALUES:
            raise ValueError(f"holds more than {MAX_VALUES:,} values, with those that aliases repeat; make it shorter")
