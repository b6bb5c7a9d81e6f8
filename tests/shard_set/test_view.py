"""Looking into shards: counting, finding, checking, choosing; flat and partitioned sets, on disks and in buckets."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from s3_server import KEY, serve_s3
from s3_server import SECRET as SECRET_KEY

from composer_path.data.conversation import Conversation
from composer_path.data.image import resize_image
from composer_path.data.sample_format import COLUMNS, pack_images
from composer_path.shard_set.check import LabelCounter, check_shards
from composer_path.shard_set.select import Condition, select_samples
from composer_path.shard_set.summary import summarize
from composer_path.shard_set.view import ShardView, ShardViewError, StoredSample
from composer_path.storage.places import StorageError

REPO = Path(__file__).resolve().parents[2]
SECRET = "Miller-Jane-4711"
NUM_RECORDS = 30
MARKER = json.dumps({"files": [{"name": "image_hashes.bin", "bytes": 8, "xxh64": "0" * 16}]})


def records() -> list[dict[str, Any]]:
    """Records of the demo's set, text-only ones and ones with two images among them."""
    every = json.loads((REPO / "test_data" / "data.json").read_text())
    chosen = random.Random(0).sample(every, NUM_RECORDS - 4)
    chosen += [record for record in every if not record.get("image")][:2]
    chosen += [record for record in every if isinstance(record.get("image"), list) and len(record["image"]) == 2][:2]
    assert len(chosen) == NUM_RECORDS
    return chosen


def columns_of(record: dict[str, Any]) -> dict[str, Any]:
    conversation = Conversation.from_record(record)
    files = [(REPO / "test_data" / "imgs" / str(name)).read_bytes() for name in conversation.images]
    metadata = {**conversation.metadata, "images": list(conversation.images)}
    values = {"id": conversation.id, "conversation": conversation.to_shard(), "images": pack_images(files)}
    return {**values, "metadata": metadata}


def write_set(folder: Path, samples: list[dict[str, Any]], card: dict[str, Any] | None = None, **keywords: Any) -> Path:
    """A flat set by Streaming's own writer, as earlier versions wrote it: shard.00000.mds and so on."""
    from streaming import MDSWriter

    keywords = {"size_limit": 100_000, "hashes": ["xxh64"], **keywords}
    with MDSWriter(columns=COLUMNS, out=str(folder), **keywords) as writer:
        for sample in samples:
            writer.write(sample)
    given = {"records": len(samples), "options": {"ids": "keep"}, **(card or {})}
    (folder / "dataset.json").write_text(json.dumps(given))
    return folder


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    return [columns_of(record) for record in records()]


@pytest.fixture(scope="module")
def flat(samples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_set(tmp_path_factory.mktemp("sets") / "flat", samples)
    assert len(list(folder.glob("*.mds"))) >= 3
    return folder


@pytest.fixture(scope="module")
def partitioned(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards in two parts."""
    folder = tmp_path_factory.mktemp("sets") / "partitioned"
    index = json.loads((flat / "index.json").read_text())
    for number, shard in enumerate(index["shards"]):
        part = folder / f"part-{number // 2:05}"
        part.mkdir(parents=True, exist_ok=True)
        (part / "done.json").write_text('{"files": []}')
        name = f"{part.name}/shard.{number % 2:05}.mds"
        shutil.copy(flat / shard["raw_data"]["basename"], folder / name)
        shard["raw_data"]["basename"] = name
    (folder / "index.json").write_text(json.dumps(index))
    shutil.copy(flat / "dataset.json", folder)
    return folder


@pytest.fixture(scope="module")
def compressed(samples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "compressed", samples, compression="zstd")


@pytest.fixture
def bucket(partitioned: Path) -> Iterator[str]:
    """The same set in fsspec's store in memory; the tests of conversion and of streaming have real servers."""
    store = fsspec.filesystem("memory")
    store.put(f"{partitioned}/", "/bucket/set/", recursive=True)
    yield "memory://bucket/set"
    store.rm("/bucket", recursive=True)


@pytest.fixture(params=["flat", "partitioned", "compressed", "bucket"])
def any_set(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def all_samples(place: str | Path) -> list[StoredSample]:
    view = ShardView(place)
    return [sample for number in range(len(view.shards)) for sample in view.samples(number)]


def test_every_sample_is_found_by_position_and_by_id(any_set: str, samples: list[dict[str, Any]]) -> None:
    view = ShardView(any_set)
    assert len(view) == NUM_RECORDS
    for position in (0, 7, 11, NUM_RECORDS - 1):
        for sample in (view.sample(position), view.find(samples[position]["id"])):
            assert (sample.position, sample.id) == (position, samples[position]["id"])
            assert sample.conversation.to_shard() == samples[position]["conversation"]
            assert sample.metadata == samples[position]["metadata"]
            assert pack_images(sample.images) == samples[position]["images"]
    for position in (-1, NUM_RECORDS):
        with pytest.raises(ShardViewError, match=f"from 0 to {NUM_RECORDS - 1}, found {position}"):
            view.sample(position)
    with pytest.raises(ShardViewError, match=r"no sample has this id$"):
        view.find("nobody")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_summary_counts_what_the_records_hold(any_set: str, workers: int) -> None:
    summary = summarize(ShardView(any_set), workers)
    conversations = [Conversation.from_record(record) for record in records()]
    turns = [turn for conversation in conversations for turn in conversation.turns]
    images = sum(conversation.num_images for conversation in conversations)
    assert (summary.records, summary.images, summary.text_only) == (NUM_RECORDS, images, 2)
    assert summary.turns == len(turns)
    assert summary.answer_chars == Counter(len(turn.text) for turn in turns if turn.role == "assistant")
    assert summary.sources == Counter(c.metadata.get("source", "") for c in conversations)
    assert summary.image_kinds == {"JPEG": images}
    assert sum(summary.image_sizes.values()) == images
    assert f"{'records':<36}{NUM_RECORDS}" in str(summary)


def test_a_summary_says_least_median_and_greatest_and_resized_images(tmp_path: Path) -> None:
    image = (REPO / "test_data" / "imgs").glob("*.jpg").__next__().read_bytes()
    turns = [["human", "<image>"], ["assistant", "a"], ["human", "bb?"], ["assistant", "b" * 9]]
    sample = {"id": "1", "conversation": {"turns": turns, "system": None}, "metadata": {}}
    square = {**sample, "images": pack_images([resize_image(image, 28)])}
    damaged = {**sample, "images": pack_images([b"no image"])}
    text = str(summarize(ShardView(write_set(tmp_path / "set", [square, square, damaged]))))
    assert "characters of an answer             1 to 9, median 1" in text
    assert "images stored as resized            2" in text
    assert "  28 x 28 pixels                    2" in text
    assert "images stored as unreadable         1" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold index.json, found none"),
        ("{", "index.json must be JSON, found a damaged file"),
        ("[]", "must list MDS shards"),
        ('{"version": 1, "shards": []}', "must list MDS shards"),
        ('{"version": 2, "shards": [{"format": "csv"}]}', "must list MDS shards with the columns id, conversation"),
    ],
)
def test_what_is_no_set_of_ours_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(ShardViewError, match=message):
        ShardView(tmp_path)
    with pytest.raises(ShardViewError, match=r"must hold index\.json"):
        ShardView(tmp_path / "nowhere")


def test_an_index_cannot_lead_out_of_its_set(flat: Path, tmp_path: Path) -> None:
    index = json.loads((flat / "index.json").read_text())
    for name in ("/etc/passwd", "../flat/shard.00000.mds", "a/../../b.mds"):
        index["shards"][0]["raw_data"]["basename"] = name
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(ShardViewError, match="must list MDS shards"):
            ShardView(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_set_has_no_problem(any_set: str, workers: int) -> None:
    result = check_shards(ShardView(any_set), workers)
    assert result.problems == []
    images = sum(Conversation.from_record(record).num_images for record in records())
    assert (result.samples, result.images, result.without_hash) == (NUM_RECORDS, images, 0)
    assert str(result).endswith("no problem")


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / "index.json").read_text())
    edit(index)
    (folder / "index.json").write_text(json.dumps(index))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def damage(folder: Path, kind: str) -> None:
    second = folder / json.loads((folder / "index.json").read_text())["shards"][1]["raw_data"]["basename"]
    if kind == "missing":
        second.unlink()
    elif kind == "cut":
        second.write_bytes(second.read_bytes()[:-1000])
    elif kind == "flipped":
        flip(second, -100)
    elif kind == "flipped header":
        flip(second, 0)
    elif kind == "flipped header, no hash":
        flip(second, 0)
        edit_index(folder, lambda index: [shard["raw_data"].update(hashes={}) for shard in index["shards"]])
    elif kind == "card":
        (folder / "dataset.json").write_text('{"records": 7}')
    elif kind == "no card":
        (folder / "dataset.json").unlink()
    elif kind == "orphan":
        shutil.copy(second, folder / "shard.00099.mds")
    elif kind == "marked file":
        (folder / "part-00000" / "image_hashes.bin").write_bytes(b"12345678")
        (folder / "part-00000" / "done.json").write_text(MARKER)
        (folder / "part-00001" / "done.json").write_text("[]")
    elif kind == "stray":
        (folder / f"{SECRET}.txt").write_text(SECRET)
    elif kind == "resized":
        card = {"records": NUM_RECORDS, "resized": {"image_size": 28, "fit": "pad", "pad_color": [1, 2, 3]}}
        (folder / "dataset.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        ("missing", {"unreadable"}),
        ("cut", {"size"}),
        ("flipped", {"hash"}),
        ("flipped header", {"hash"}),
        ("flipped header, no hash", {"damaged"}),
        ("card", {"count"}),
        ("no card", {"missing"}),
        ("orphan", {"not-in-index"}),
        ("stray", {"not-in-index"}),
        ("resized", {"not-resized"}),
    ],
)
@pytest.mark.parametrize("layout", ["flat", "partitioned"])
def test_each_damage_is_found_and_named(
    kind: str, rules: set[str], layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(request.getfixturevalue(layout), folder)
    damage(folder, kind)
    result = check_shards(ShardView(folder))
    assert kind != "flipped" or check_shards(ShardView(folder), workers=2) == result
    found = result.problems
    # A flipped byte in an image may also be found when it is decoded.
    assert {problem.rule for problem in found} - {"unreadable-image", "damaged"} == rules - {"damaged"}
    assert found
    assert SECRET not in str(result)
    if kind not in ("resized", "card", "no card", "orphan", "stray"):
        assert len({problem.file for problem in found}) == 1


def test_samples_that_are_bad_under_a_right_hash_are_found(tmp_path: Path) -> None:
    good = columns_of(records()[0])
    image = next((REPO / "test_data" / "imgs").glob("*.jpg")).read_bytes()
    bad = [
        {**good, "images": pack_images([image[: len(image) // 2]])},
        {**good, "images": pack_images([SECRET.encode()])},
        {**good, "images": pack_images([image, image, image])},
        {**good, "images": b"\x07"},
        {**good, "conversation": {"turns": [[SECRET]]}},
        {**good, "metadata": [SECRET]},
        {**good, "images": pack_images([resize_image(image, 28)[:-1]])},
        {**good, "images": pack_images([resize_image(image, 28)])},  # the card says nothing of resizing
    ]
    result = check_shards(ShardView(write_set(tmp_path / "set", [good, *bad, good])))
    expected = ["unreadable-image"] * 2 + ["damaged"] * 4 + ["unreadable-image", "resized"]
    assert [(problem.position, problem.rule) for problem in result.problems] == list(enumerate(expected, start=1))
    assert SECRET not in str(result)


def test_the_check_reads_an_index_without_hashes_and_says_so(samples: list[dict[str, Any]], tmp_path: Path) -> None:
    result = check_shards(ShardView(write_set(tmp_path / "set", samples[:2], hashes=[])))
    assert (result.problems, result.without_hash) == ([], 1)
    assert str(result).endswith("the index has no checksum of 1 shards")


def test_labels_are_counted_under_the_template_that_training_uses(tmp_path: Path, mistral_tokenizer_path: Path) -> None:
    one = {"turns": [["human", "Which?"], ["assistant", "This one."]], "system": None}
    two = {"turns": one["turns"] * 2, "system": None}
    long = {"turns": [["human", "Which? " * 50], ["assistant", "This one."]], "system": None}
    rows = [{"id": "x", "conversation": c, "images": pack_images([]), "metadata": {}} for c in (one, two, long)]
    view = ShardView(write_set(tmp_path / "set", rows))

    def rules(template: str, max_seq_len: int | None = None) -> list[tuple[int | None, str]]:
        counter = LabelCounter(str(mistral_tokenizer_path), template, max_seq_len)
        return [(problem.position, problem.rule) for problem in check_shards(view, 1, counter).problems]

    assert rules("plain") == [(1, "template")]
    assert rules("llava_llama_2") == []
    assert rules("llava_llama_2", 120) == [(2, "no-labels")]
    with pytest.raises(ValueError, match="unknown name 'unknown'"):
        rules("unknown")


@pytest.mark.parametrize(
    ("text", "fitting"),
    [
        ("source=cmu", [0]),
        ("source=cmu|ihc", [0, 1]),
        ("source!=cmu", [1, 2]),
        ("stain=H&E", [0]),
        ("mpp<0.5", [0]),
        ("mpp<=0.5", [0, 1]),
        ("mpp=0.5", [1]),
        ("magnification>=20", [1, 2]),
        ("magnification=20x", [1]),
        ("meta.site.ward=3", [2]),
        ("meta.site!=A", [0, 1, 2]),
        ("images=0", [0, 1, 2]),
        ("turns>2", [2]),
        ("id=b", [1]),
        ("patient=p", []),
    ],
)
def test_conditions_choose_what_they_say(text: str, fitting: list[int]) -> None:
    metadata = [
        {"source": "cmu", "stain": "H&E", "mpp": 0.25, "magnification": "high"},
        {"source": "ihc", "mpp": 0.5, "magnification": "20x"},
        {"magnification": 40, "meta": {"site": {"ward": 3}}},
    ]
    conversation = {"turns": [["human", "a"], ["assistant", "b"]], "system": None}
    longer = {"turns": conversation["turns"] * 2, "system": None}
    samples = [
        StoredSample(n, "s", "abc"[n], Conversation.from_shard(longer if n == 2 else conversation, 0), (), metadata[n])
        for n in range(3)
    ]
    condition = Condition.parse(text)
    assert [sample.position for sample in samples if condition.fits(sample)] == fitting


@pytest.mark.parametrize("text", [SECRET, "=3", "colour=red", "mpp<wide", "mpp<", "conversation=yes"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        Condition.parse(text)
    assert SECRET not in str(caught.value)


def test_what_else_a_conversion_wrote_is_checked_too(partitioned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(partitioned, folder)
    damage(folder, "marked file")
    found = [(problem.file, problem.rule) for problem in check_shards(ShardView(folder)).problems]
    assert found == [("part-00000/image_hashes.bin", "hash"), ("part-00001/done.json", "damaged")]


@pytest.mark.parametrize("workers", [1, 2])
def test_chosen_samples_are_copied_bit_for_bit_in_order(any_set: str, tmp_path: Path, workers: int) -> None:
    from streaming import StreamingDataset

    condition = Condition.parse("stain=H&E")
    out = tmp_path / "out"
    summary = select_samples(ShardView(any_set), str(out), [condition], workers=workers)
    expected = [sample for sample in all_samples(any_set) if condition.fits(sample)]
    assert 0 < len(expected) < NUM_RECORDS
    assert summary.records == len(expected)
    chosen = all_samples(out)
    for old, new in zip(expected, chosen, strict=True):
        assert (new.id, new.conversation, new.metadata, new.images) == (
            old.id,
            old.conversation,
            old.metadata,
            old.images,
        )
    assert check_shards(ShardView(out)).problems == []
    card = json.loads((out / "dataset.json").read_text())
    assert card["chosen_from"] == {"records": NUM_RECORDS, "conditions": ["stain=H&E"]}
    assert (card["records"], card["options"]) == (len(expected), {"ids": "keep"})
    reader = StreamingDataset(local=str(out), batch_size=1, shuffle=False, validate_hash="xxh64")
    assert [sample["id"] for sample in reader] == [sample.id for sample in expected]


def test_a_draw_depends_on_its_seed_alone(flat: Path, partitioned: Path, tmp_path: Path) -> None:
    draws = {}
    for name, (place, seed) in {"a": (flat, 0), "b": (partitioned, 0), "c": (flat, 1)}.items():
        select_samples(ShardView(place), str(tmp_path / name), num_samples=12, seed=seed)
        draws[name] = [sample.id for sample in all_samples(tmp_path / name)]
    assert draws["a"] == draws["b"] != draws["c"]
    ids = [sample.id for sample in all_samples(flat)]
    assert draws["a"] == [name for name in ids if name in set(draws["a"])]
    assert len(set(draws["a"])) == 12


def test_choosing_writes_to_a_bucket(bucket: str) -> None:
    select_samples(ShardView(bucket), "memory://bucket/chosen", num_samples=5)
    assert len(all_samples("memory://bucket/chosen")) == 5
    assert check_shards(ShardView("memory://bucket/chosen")).problems == []


def test_a_set_on_a_real_s3_server_is_viewed_checked_and_chosen_from(
    partitioned: Path, samples: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = tmp_path / "s3" / "bucket"
    shutil.copytree(partitioned, bucket / "set")
    with serve_s3(tmp_path / "s3") as port:
        environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**environment, "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(name, value)
        view = ShardView("s3://bucket/set")
        assert view.sample(17).metadata == samples[17]["metadata"]
        assert check_shards(view, workers=2).problems == []
        select_samples(view, "s3://bucket/chosen", [Condition.parse("stain=H&E")], num_samples=5, workers=2)
        assert check_shards(ShardView("s3://bucket/chosen")).problems == []
        assert sorted(path.name for path in (bucket / "chosen").iterdir()) == [
            "dataset.json",
            "index.json",
            "part-00000",
        ]

        flip(next((bucket / "set" / "part-00000").glob("*.mds")), -1)
        (bucket / "set" / "stray.mds").write_bytes(b"")
        rules = {problem.rule for problem in check_shards(ShardView("s3://bucket/set"), workers=2).problems}
        assert rules == {"hash", "not-in-index"}
        with pytest.raises(ShardViewError, match="must be empty"):
            select_samples(view, "s3://bucket/chosen", num_samples=5)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
        with pytest.raises(ShardViewError, match="SignatureDoesNotMatch") as caught:
            ShardView("s3://bucket/set")
        assert "another-secret" not in str(caught.value)


def test_a_choice_that_cannot_be_made_writes_nothing(flat: Path, tmp_path: Path) -> None:
    view, out = ShardView(flat), tmp_path / "out"
    with pytest.raises(ShardViewError, match="no sample fits"):
        select_samples(view, str(out), [Condition.parse("source=nowhere")])
    for number in (0, NUM_RECORDS + 1):
        with pytest.raises(ShardViewError, match=f"{NUM_RECORDS} samples to draw from, not {number}"):
            select_samples(view, str(out), num_samples=number)
    assert not out.exists()
    with pytest.raises(ShardViewError, match="must be empty"):
        select_samples(view, str(flat), num_samples=3)
    assert len(all_samples(flat)) == NUM_RECORDS


def test_an_exception_while_choosing_leaves_nothing(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer_path.shard_set import select

    def fail(*arguments: Any) -> None:
        raise StorageError("the disk is full")

    out = tmp_path / "out"
    monkeypatch.setattr(select, "_card", fail)  # after the shards, before the index
    with pytest.raises(StorageError, match="full"):
        select_samples(ShardView(flat), str(out), num_samples=20)
    assert not out.exists()


def test_a_damaged_set_is_never_chosen_from(flat: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(flat, folder)
    damage(folder, "flipped header")
    with pytest.raises(ShardViewError, match="doesn't fit"):
        select_samples(ShardView(folder), str(tmp_path / "out"), num_samples=NUM_RECORDS)
    assert not (tmp_path / "out").exists()


def test_a_data_card_repeats_no_identifier() -> None:
    texts = [f"patient={SECRET}", f"id!={SECRET}", f"meta.name={SECRET}", "stain=H&E|IHC"]
    assert [str(Condition.parse(text)) for text in texts] == [
        "patient=...",
        "id!=...",
        "meta.name=...",
        "stain=H&E|IHC",
    ]
