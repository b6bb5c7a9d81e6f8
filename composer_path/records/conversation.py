"""A conversation: turns and images of one record that keeps the rules of `records/rules.py`, or of a shard's sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from composer_path.records.rules import IMAGE_TAG, METADATA_TYPES, ROLES, has_type, images_of, problems_of
from composer_path.records.slide_region import SlideRegion


@dataclass(frozen=True)
class Turn:
    """One turn: `role` is 'human' or 'assistant'; `text` is as given, with its image tags.

    Each token of an answer counts `weight` in the loss, from 0 (it is read, not learned) to 1.
    """

    role: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """A checked conversation; the n-th `<image>` tag of its human turns is the n-th image.

    Built by `from_record` for training. For asking a model, build it directly with a last human turn.

    Attributes:
        turns: Alternating human and assistant turns, human first.
        images: File names under the image folder, or regions of slides there; empty strings when the conversation
            was read from a shard.
        system: System message of this record, or None for the prompt template's own.
        id: The record's id, or None.
        metadata: Those given of source, organ, stain, magnification, mpp, meta, patient, slide.
        dropped_turns: Leading assistant turns that were dropped, as the reference does (0 or 1).
        image_without_tag: The record had one image and no tag; a tag was put before the first question.
    """

    turns: tuple[Turn, ...]
    images: tuple[str | SlideRegion, ...] = ()
    system: str | None = None
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dropped_turns: int = 0
    image_without_tag: bool = False

    @classmethod
    def from_record(cls, record: object) -> Conversation:
        """Check a record, as `json.loads` gives it, against every rule that needs no file; build its conversation.

        Raises:
            RecordError: The first rule that is broken; `problems_of` lists all of them.
        """
        if problems := problems_of(record):
            raise problems[0]
        assert isinstance(record, dict)
        turns = [Turn(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
        dropped_turns = int(turns[0].role == "assistant")
        turns = turns[dropped_turns:]
        images = tuple(SlideRegion.from_record(one) if isinstance(one, dict) else one for one in images_of(record))
        image_without_tag = len(images) == 1 and _num_tags(turns) == 0
        if image_without_tag:
            turns[0] = Turn("human", f"{IMAGE_TAG}\n{turns[0].text}")
        metadata = {key: record[key] for key in METADATA_TYPES if record.get(key) is not None}
        metadata |= {key: str(metadata[key]) for key in ("patient", "slide") if key in metadata}
        system = record.get("system")
        return cls(tuple(turns), images, system, id_of(record), metadata, dropped_turns, image_without_tag)

    @property
    def num_images(self) -> int:
        """Number of images, which is the number of tags."""
        return len(self.images)

    def to_shard(self) -> dict[str, Any]:
        """What a shard's `conversation` column holds: turns and system message."""
        turns = [[turn.role, turn.text, *([] if turn.weight == 1 else [turn.weight])] for turn in self.turns]
        return {"turns": turns, "system": self.system}

    @classmethod
    def from_shard(cls, data: Mapping[str, Any], num_images: int) -> Conversation:
        """Build the conversation of a shard's sample from what `to_shard` wrote; its images have no names there.

        Raises:
            ValueError: Tags and images differ in number, so the shard wasn't written by `convert`.
        """
        turns = [Turn(*turn) for turn in data["turns"]]
        num_tags = _num_tags(turns)
        if num_tags != num_images:
            raise ValueError(
                f"a sample of a shard must have one image for each {IMAGE_TAG} tag, "
                f"found {num_tags} tags and {num_images} images; convert the data again"
            )
        return cls(turns=tuple(turns), images=("",) * num_images, system=data.get("system"))


def id_of(record: object) -> str | None:
    """A record's id as text (public sets also number them), or None if it has no usable one."""
    value = record.get("id") if isinstance(record, dict) else None
    return str(value) if has_type(value, (str, int)) and value != "" else None


def _num_tags(turns: Sequence[Turn]) -> int:
    return sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
