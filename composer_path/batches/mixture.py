"""Several sets of shards in one epoch, each with its own share, prompt template, system message and loss weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from composer_path.records.prompts import PlainTemplate, PromptTemplate, get_template
from composer_path.records.tokenize import TextPreparation
from composer_path.stream.guarded_stream import GuardedStream

Template = str | Mapping[str, Any]  # as a YAML names one, see `get_template`


@dataclass(frozen=True)
class Source:
    """How the samples of one stream are read."""

    name: str | None  # in logs; None where each record's own source is taken
    text: TextPreparation
    loss_weight: float = 1.0  # what an answer token counts, beside one of a source with weight 1


def build_streams(
    streams: Mapping[str, Mapping[str, Any]], template: Template | None, text: TextPreparation
) -> tuple[list[GuardedStream], list[Source]]:
    """The streams that a YAML names, as keywords of `build_stream`; `template` is that of those that name none."""
    check_streams(streams)
    built = [build_stream(name, text, **{"template": template} | given(keywords)) for name, keywords in streams.items()]
    return [stream for stream, _ in built], [source for _, source in built]


def build_stream(
    name: str,
    text: TextPreparation,
    *,
    local: str,
    remote: str | None = None,
    split: str | None = None,
    proportion: float | None = None,
    repeat: float | None = None,
    choose: int | None = None,
    template: Template | None = None,
    system: str | None = None,
    loss_weight: float = Source.loss_weight,
) -> tuple[GuardedStream, Source]:
    """One stream of a mixture.

    Args:
        name: In logs.
        text: Of the mixture.
        local: Folder of its shards, or of their cache; no other stream's.
        remote: Folder or URL they come from.
        split: Subfolder of both.
        proportion: Its share of the epoch, relative to the other streams' (all have one, or none has).
        repeat: How often an epoch holds it: 2.0 twice, 0.5 every other sample.
        choose: How many of its samples an epoch holds.
        template: Prompt template, see `composer_path.records.prompts`; None for the mixture's.
        system: System message of records without one, in place of the template's own.
        loss_weight: What an answer token counts, beside one of a stream with weight 1.
    """
    shares: dict[str, Any] = {"proportion": proportion, "repeat": repeat, "choose": choose}
    stream = GuardedStream(local=local, remote=remote, split=split, name=name, **shares)
    return stream, Source(name, replace(text, template=template_of(template, system)), loss_weight)


def template_of(template: Template | None, system: str | None = None) -> PromptTemplate:
    """A stream's prompt template, with its own system message; `plain` where none is named."""
    settings = template if isinstance(template, Mapping) else {"name": template or PlainTemplate.name}
    return get_template({**settings, **given({"system": system})})


def asking_template(template: Template | None, streams: Mapping[str, Mapping[str, Any]] | None) -> PromptTemplate:
    """The template with which a model is asked that is trained on a set (no `streams`) or on streams.

    Raises:
        ValueError: The streams have several templates, and `template` says none of them.
    """
    if not streams:
        return template_of(template)
    trained = [template_of(own.get("template") or template, own.get("system")) for own in streams.values()]
    names = dict.fromkeys(one.name for one in trained)
    if template is not None:
        named = template_of(template)
        if named.name in names:
            return named
        found = f"found '{named.name}', but the streams are trained with {', '.join(names)}"
    elif all(one == trained[0] for one in trained):
        return trained[0]
    elif len(names) > 1:
        found = f"is missing, and the streams have several ({', '.join(names)})"
    else:
        found = f"is missing, and the streams have '{trained[0].name}' with several settings"
    raise ValueError(f"template: {found}; name the one that the model is asked with")


def given(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A stream's keywords without those left at null, for which the mixture's stand."""
    return {key: value for key, value in keywords.items() if value is not None}


def check_streams(streams: Mapping[str, Mapping[str, Any]]) -> None:
    """What the numbers of each stream must be, and what streams must have in common.

    Raises:
        ValueError: They don't.
    """
    if not streams:
        raise ValueError("streams: found none; name at least one, or give local")
    folders: dict[tuple[Any, Any], str] = {}
    for name, keywords in streams.items():
        own = given(keywords)
        shares = [key for key in ("proportion", "repeat", "choose") if key in own]
        if len(shares) > 1:
            raise ValueError(f"streams.{name}: found {' and '.join(shares)}; give one of them, they say the same thing")
        for key in (*shares, "loss_weight"):
            if own.get(key, 1) <= 0:
                raise ValueError(f"streams.{name}.{key}: found {own[key]}; it must be above 0, or leave the stream out")
        other = folders.setdefault((own.get("local"), own.get("split")), name)
        if other != name:
            raise ValueError(f"streams.{name}.local: is also the folder of {other}; give each stream its own")
    sharing = [name for name, keywords in streams.items() if keywords.get("proportion") is not None]
    if sharing and len(sharing) < len(streams):
        without, those = ", ".join(name for name in streams if name not in sharing), ", ".join(sharing)
        raise ValueError(f"streams: {those} has a proportion, {without} has none; give it to all or to none")
