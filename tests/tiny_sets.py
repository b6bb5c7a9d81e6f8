"""Small sets of shards to look into, and ways to damage them; real histology of the demo."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer_path.records.conversation import Conversation
from composer_path.shards.columns import COLUMNS, pack_images
from composer_path.shards.view import ShardView, StoredSample

REPO = Path(__file__).resolve().parents[1]
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


def all_samples(place: str | Path) -> list[StoredSample]:
    view = ShardView(place)
    return [sample for number in range(len(view.shards)) for sample in view.samples(number)]


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
