"""Several sets of shards in one epoch, each with its own share, prompt template, system message and loss weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer_path.records.prompts import PromptTemplate, get_template
from composer_path.stream.guarded_stream import GuardedStream


@dataclass(frozen=True)
class Source:
    """How the samples of one stream are read.

    Attributes:
        name: In logs; None where each record's own source is taken.
        template: Prompt template.
        loss_weight: What an answer token counts, beside one of a source with weight 1.
    """

    name: str | None
    template: PromptTemplate
    loss_weight: float = 1.0


def build_streams(
    streams: Mapping[str, Mapping[str, Any]], template: str | Mapping[str, Any]
) -> tuple[list[GuardedStream], list[Source]]:
    """The streams that a YAML names.

    Args:
        streams: Name -> keywords of `build_stream`.
        template: Of streams that name none.
    """
    built = [build_stream(name, **{"template": template} | dict(keywords)) for name, keywords in streams.items()]
    return [stream for stream, _ in built], [source for _, source in built]


def build_stream(
    name: str,
    *,
    local: str,
    remote: str | None = None,
    split: str | None = None,
    proportion: float | None = None,
    repeat: float | None = None,
    choose: int | None = None,
    template: str | Mapping[str, Any] = "plain",
    system: str | None = None,
    loss_weight: float = 1.0,
) -> tuple[GuardedStream, Source]:
    """One stream of a mixture.

    Args:
        name: In logs.
        local: Folder of its shards, or of their cache; no other stream's.
        remote: Folder or URL they come from.
        split: Subfolder of both.
        proportion: Its share of the epoch, relative to the other streams' (all have one, or none has).
        repeat: How often an epoch holds it: 2.0 twice, 0.5 every other sample.
        choose: How many of its samples an epoch holds.
        template: Prompt template, see `composer_path.records.prompts`.
        system: System message of records without one, in place of the template's own.
        loss_weight: What an answer token counts, beside one of a stream with weight 1.

    Raises:
        ValueError: These don't go together.
    """
    check_stream(name, proportion=proportion, repeat=repeat, choose=choose, loss_weight=loss_weight)
    stream = GuardedStream(
        local=local, remote=remote, split=split, proportion=proportion, repeat=repeat, choose=choose, name=name
    )
    return stream, Source(name, template_of(template, system), loss_weight)


def template_of(template: str | Mapping[str, Any], system: str | None = None) -> PromptTemplate:
    """A stream's prompt template, with its own system message."""
    settings: dict[str, Any] = {"name": template} if isinstance(template, str) else dict(template)
    return get_template(settings if system is None else settings | {"system": system})


def check_stream(name: str, **keywords: Any) -> None:
    """What the numbers of a stream must be.

    Raises:
        ValueError: One of them isn't.
    """
    given = [key for key in ("proportion", "repeat", "choose") if keywords.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"streams.{name}: found {' and '.join(given)}; give one of them, they say the same thing")
    for key in (*given, "loss_weight"):
        value = keywords.get(key)
        if value is not None and value <= 0:
            raise ValueError(f"streams.{name}.{key}: found {value}; it must be above 0, or leave the stream out")


def check_streams(streams: Mapping[str, Mapping[str, Any]]) -> None:
    """What the streams of a mixture must have in common.

    Raises:
        ValueError: They haven't.
    """
    if not streams:
        raise ValueError("streams: found none; name at least one, or give local")
    for name, keywords in streams.items():
        check_stream(name, **keywords)
    shares = [name for name, keywords in streams.items() if keywords.get("proportion") is not None]
    if shares and len(shares) < len(streams):
        without = ", ".join(name for name in streams if name not in shares)
        raise ValueError(
            f"streams: {', '.join(shares)} has a proportion, {without} has none; give it to all or to none"
        )
    seen: dict[tuple[Any, Any], str] = {}
    for name, keywords in streams.items():
        folder = (keywords.get("local"), keywords.get("split"))
        if folder in seen:
            raise ValueError(f"streams.{name}.local: is also the folder of {seen[folder]}; give each stream its own")
        seen[folder] = name
