"""Is a set of shards whole and fit for training? Every object, every sample and every image is looked at."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_path.images.examiner import Examiner
from composer_path.images.features import INDEX_KEY as FEATURES_KEY
from composer_path.images.features import FeaturesError, FeatureSet, features_in_index, is_features, unpack_features
from composer_path.images.stored_square import ResizedMismatch, Square, is_square, square_of
from composer_path.records.conversation import Conversation
from composer_path.records.prompts import TemplateError
from composer_path.records.rules import ImageError
from composer_path.shards.index import (
    CARD_NAME,
    DONE_NAME,
    IMAGE_HASHES_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    REPLACEMENT,
    is_lengths,
    is_ours,
)
from composer_path.shards.mds import DamagedShard, MdsFile, ShardError, name_of, open_mds, stored_info
from composer_path.shards.view import ShardView, over_shards, to_sample
from composer_path.storage.places import Bucket
from composer_path.stream.stored_file import file_hash, pick_hash

if TYPE_CHECKING:
    from composer_path.records.tokenize import TextPreparation
    from composer_path.records.vocabulary import TextEncoder
else:
    TextPreparation = TextEncoder = Any  # importing torch takes seconds, and labels are counted on request only

LabelCount = Callable[[Conversation], int]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: str  # name in the set
    rule: str  # a short slug
    found: str  # never text, a name or an id
    position: int | None = None  # the sample's, if one is meant

    def __str__(self) -> str:
        """Where, the rule, what was found."""
        place = "" if self.position is None else f"sample {self.position}: "
        return f"{self.file}: {place}{self.rule}: {self.found}"


@dataclass
class CheckResult:
    """What a check looked at and found; problems are in the set's order."""

    shards: int = 0
    samples: int = 0
    images: int = 0
    without_hash: int = 0  # shards for which the index has no checksum
    problems: list[Problem] = field(default_factory=list)

    def add(self, other: CheckResult) -> None:
        """Add what was found in another part of the set."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def __str__(self) -> str:
        """The problems, then one line of what was looked at."""
        looked = f"{self.shards} shards, {self.samples} samples and {self.images} images"
        hashes = f"; the index has no checksum of {self.without_hash} shards" if self.without_hash else ""
        end = f"{len(self.problems)} problems" if self.problems else "no problem"
        return "\n".join([*map(str, self.problems), f"{looked} read, {end}{hashes}"])


@dataclass(frozen=True)
class LabelCounter:
    """Counts the tokens of a conversation that are learned, as training would."""

    encoder: TextEncoder
    text: TextPreparation

    def __call__(self, conversation: Conversation) -> int:
        """The number of labels."""
        return self.text.tokenize(conversation, self.encoder).num_answer_tokens


def check_shards(
    view: ShardView, workers: int = 1, count_labels: LabelCount | None = None, progress: Progress | None = None
) -> CheckResult:
    """Check every object's size and checksum, that every sample and image decodes, and that every sample has labels.

    Labels are checked if `count_labels` is given, see `LabelCounter`; `progress` is called with the number of shards
    after each. Nothing is raised for a damaged set.
    """
    result = CheckResult(problems=_set_problems(view))
    for part in over_shards(_check_shard, view, count_labels, workers, progress):
        result.add(part)
    return result


def _set_problems(view: ShardView) -> list[Problem]:
    """What is wrong with the set as a whole: its card, and objects that no index names."""
    problems = []
    if view.features is not None and _feature_set(view) is None:
        problems.append(Problem(INDEX_NAME, "features", "of a kind that this version of composer_path doesn't know"))
    records = view.card.get("records")
    if not view.card:
        problems.append(Problem(CARD_NAME, "missing", "there is no data card"))
    elif records != len(view):
        problems.append(Problem(CARD_NAME, "count", f"{records} records, the index has {len(view)}"))
    shards = {stored_info(shard)["basename"] for shard in view.shards}
    # What is to take this set's place one day isn't part of it, nor is what a killed process left of that.
    files = {name for name in view.place.files() if not (name.startswith(f"{REPLACEMENT}/") and is_ours(name))}
    known = set(shards)
    for name in sorted(name for name in files if Path(name).name == DONE_NAME):
        part = name.removesuffix(DONE_NAME)
        known |= {name, part + IMAGE_HASHES_NAME}
        try:
            marked = json.loads(view.place.read(name))["files"]
            beside = {part + file["name"]: (file["bytes"], file["xxh64"]) for file in marked}
        except (ValueError, KeyError, TypeError):
            problems.append(Problem(name, "damaged", "it isn't what composer-path convert writes there"))
            continue
        for other in sorted(beside.keys() - shards):
            if other in files and view.place.digest(other) != beside[other]:
                problems.append(Problem(other, "hash", f"another file than {name} says"))
    known |= {INDEX_NAME, CARD_NAME, MANIFEST_NAME} | {name for name in files if is_lengths(name)}
    for name in sorted(files - known):
        problems.append(Problem(_shown_name(name), "not-in-index", "a file that belongs to no shard of this set"))
    return problems


def _feature_set(view: ShardView) -> FeatureSet | None:
    """What the index says of features; None if it says nothing, or what only a later version knows."""
    try:
        return features_in_index(json.dumps({FEATURES_KEY: view.features}).encode())
    except FeaturesError:
        return None


def _shown_name(name: str) -> str:
    """A stray file may be called after a patient; ours never are."""
    return name if name.endswith((".mds", ".json")) and len(name) < 60 else "(another file)"


def _check_shard(task: tuple[ShardView, int, LabelCount | None]) -> CheckResult:
    view, number, count_labels = task
    shard, result = view.shards[number], CheckResult(shards=1)
    name = name_of(shard)
    try:
        with _on_disk(view, stored_info(shard)["basename"]) as path:
            if (problem := _file_problem(path, shard, result)) is not None:
                result.problems.append(Problem(name, *problem))
            with open(path, "rb") as file:
                _check_samples(view, number, open_mds(file, shard), count_labels, result)
    except DamagedShard as error:
        if not result.problems:  # else it is known already that this isn't the file
            result.problems.append(Problem(name, "damaged", str(error).removeprefix(f"{name}: ")))
    except ShardError as error:
        found = str(error).removeprefix(f"{view.place}: ").removeprefix(f"{name}: ")
        result.problems.append(Problem(name, "unreadable", found))
    return result


def _file_problem(path: Path, shard: dict[str, Any], result: CheckResult) -> tuple[str, str] | None:
    """Rule and finding, if it isn't the file of the index."""
    info, size = stored_info(shard), path.stat().st_size
    if size != info["bytes"]:
        return "size", f"{size} bytes, the index says {info['bytes']}"
    expected = pick_hash(info.get("hashes") or {})
    if expected is None:
        result.without_hash += 1
    elif (found := file_hash(path, expected[0])) != expected[1]:
        return "hash", f"{expected[0]} {found}, the index says {expected[1]}"
    return None


def _check_samples(
    view: ShardView, number: int, file: MdsFile, count_labels: LabelCount | None, result: CheckResult
) -> None:
    name, start = name_of(view.shards[number]), view.starts[number]
    resized = view.card.get("resized")
    wanted = Square.of(**resized) if isinstance(resized, dict) else None
    features = _feature_set(view)
    for position in range(start, view.starts[number + 1]):
        columns = file.read(position - start)
        result.samples += 1
        try:
            sample = to_sample(position, name, columns)
        except DamagedShard as error:
            found = str(error).removeprefix(f"{name}: sample {position}: ")
            result.problems.append(Problem(name, "damaged", found, position))
            continue
        for image in sample.images:
            result.images += 1
            if (problem := _image_problem(image, wanted, features)) is not None:
                result.problems.append(Problem(name, *problem, position))
        try:
            if count_labels is not None and not count_labels(sample.conversation):
                result.problems.append(Problem(name, "no-labels", "no token of an answer is left to learn", position))
        except TemplateError as error:
            result.problems.append(Problem(name, "template", str(error), position))


_EXAMINER = Examiner()  # a stranger's set may hold what kills a decoder


def _image_problem(data: bytes, wanted: Square | None, features: FeatureSet | None) -> tuple[str, str] | None:
    """Rule and finding, if an image doesn't decode or isn't of the kind that index and data card speak of."""
    try:
        if features is not None and is_features(data):
            unpack_features(data, features)
            return None
        if is_features(data):
            return "features", "features, of which the index says nothing"
        if features is not None:
            _EXAMINER.check(data)
            return "features", "an image file in a set of features; encode the set again"
        if not is_square(data):
            _EXAMINER.check(data)
            return None if wanted is None else ("not-resized", f"an image file, the data card says {wanted}")
        found = square_of(data)
    except FeaturesError as error:
        return "features", str(error)
    except ImageError as error:
        return error.rule, error.found
    except ResizedMismatch as error:
        return "resized", str(error)
    return None if found == wanted else ("resized", f"{found}, the data card says {wanted or 'no resizing'}")


@contextmanager
def _on_disk(view: ShardView, name: str) -> Iterator[Path]:
    """A file of the set on this machine; one of a bucket is fetched, once, and deleted afterwards."""
    place = view.place
    if not isinstance(place, Bucket):
        with view.open_file(name):  # so that its errors are worded there
            yield place.path / name
        return
    with tempfile.TemporaryDirectory(prefix="composer-path-shards-") as folder:
        path = Path(folder, "shard")
        with view.open_file(name) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 4 * 2**20)
        yield path
