"""Does each record end in acceptance or in a named rule? Seeded records with one fault each, through the whole road.

They are converted as a JSON list and as JSONL with `on_error=skip`; what is accepted is read back through the loader,
where every sample must have labels; what is refused must be listed once, with a rule of `records/rules.py`.

    PYTHONPATH=tests python -m benchmarks.fuzz_records [--num 10000] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizer_fixtures import train_byte_level_tokenizer

from benchmarks.measure import machine
from composer_path.batches.dataset import ConversationDataset
from composer_path.conversion.convert import convert
from composer_path.records.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fuzz_records.json"
DEEP_SHARE = 50  # every how many records one is deeply nested

Record = dict[str, Any]
# None of them is wrong to give: what may be said in any words.
ODD_WORDS = ("", " ", "\0", "\x1b[2J", "\u202e", "印戒", "🔬", "</s>", "[INST]", "NaN", "a" * 5000, "e\u0301", "\ufeff")
ODD_VALUES = (None, True, False, 0, -1, 1.5, 10**39, "", "x", [], [None], {}, {"a": 1}, [[1]], "\u202e")
# JSON that can only be written as text.
ODD_TEXTS = ("NaN", "-Infinity", "Infinity", "1e999", "-1e999", "9" * 5000, "1" * 41, '"\\ud800"', '"\\u0000"')
LOOKALIKES = (
    "<IMAGE>",
    "<image_1>",
    "<|image|>",
    "<img>",
    "<image/>",
    "< image >",
    "[IMG]",
    "\uff1cimage\uff1e",
    "<image",
)
KEYS = (
    "images",
    "image_path",
    "Image",
    "img",
    "video",
    "Conversations",
    "messages",
    "System",
    "hint",
    "Jane Miller",
    "",
)
FLAGS = ("loss", "weight", "train", "loss_mask", "Loss", "masked", "score")
META_KEYS = ("PatientID", "kind", "mrn", "a b", "", "\x1b", "00100020", "grade")


def good(rng: random.Random, number: int) -> Record:
    """A record that keeps every rule, of one of many shapes."""
    turns: list[Record] = []
    for index in range(rng.choice((1, 1, 2, 5))):
        turns += [
            {"from": "human", "value": f"Question {index}?"},
            {"from": rng.choice(("gpt", "assistant")), "value": "Yes."},
        ]
    record: Record = {"conversations": turns}
    num_images = rng.choice((0, 1, 1, 2))
    if num_images:
        turns[0]["value"] = "<image>\n" * num_images + turns[0]["value"]
        record["image"] = "a.png" if num_images == 1 else ["a.png", "b.png"]
    if rng.random() < 0.7:
        record["id"] = rng.choice((number, f"id-{number}"))
    for key, value in (
        ("stain", "H&E"),
        ("mpp", 0.5),
        ("meta", {"kind": "x"}),
        ("system", "Be brief."),
        ("patient", 7),
    ):
        if rng.random() < 0.3:
            record[key] = value
    return record


def put(record: Record, text: str, key: str = "organ") -> str:
    """The record as JSON, with a text in the place of a value."""
    return json.dumps({**record, key: "\1"}).replace('"\\u0001"', text, 1)


def deep(rng: random.Random, record: Record) -> str:
    """Objects or lists of any depth, wherever they may lie."""
    depth = rng.choice((2, 10, 62, 63, 64, 65, 200, 700, 995, 1100, 5000, 40_000))
    before, after = rng.choice((('{"a": ', "}"), ("[", "]"), ('[{"b": ', "}]")))
    key = rng.choice(("meta", "id", "image", "hint", "system", "conversations", "patient"))
    inner = before * depth + "1" + after * depth
    return put(record, '{"a": ' + inner + "}" if key == "meta" else inner, key)


def odd_value(rng: random.Random, record: Record) -> str:
    keys = (
        "id",
        "image",
        "system",
        "source",
        "organ",
        "stain",
        "magnification",
        "mpp",
        "meta",
        "patient",
        "conversations",
    )
    return json.dumps({**record, rng.choice(keys): rng.choice(ODD_VALUES)})


def odd_text(rng: random.Random, record: Record) -> str:
    return put(record, rng.choice(ODD_TEXTS), rng.choice(("organ", "mpp", "magnification", "hint", "id", "meta")))


def odd_words(rng: random.Random, record: Record) -> str:
    turn = rng.choice(record["conversations"])
    words = rng.choice(ODD_WORDS)
    turn["value"] = words if rng.random() < 0.3 else turn["value"] + words
    return json.dumps(record, ensure_ascii=rng.random() < 0.5)


def lookalike(rng: random.Random, record: Record) -> str:
    words = f" {rng.choice(LOOKALIKES)} "
    if rng.random() < 0.2:
        record["system"] = words
    else:
        rng.choice(record["conversations"])["value"] += words
    return json.dumps(record)


def other_key(rng: random.Random, record: Record) -> str:
    if rng.random() < 0.4:
        record.pop("image", None)
    return json.dumps({**record, rng.choice(KEYS): rng.choice(("a.png", ["a.png"], "", None, "x"))})


def twice(rng: random.Random, record: Record) -> str:
    """One of its keys, or of a turn's, given twice."""
    text = json.dumps(record)
    places = [place for place in range(len(text)) if text[place] == "{"]
    at = rng.choice(places) + 1
    return text if text[at] == "}" else text[:at] + '"from": "human", "from": "human", ' + text[at:]


def flag(rng: random.Random, record: Record) -> str:
    rng.choice(record["conversations"])[rng.choice(FLAGS)] = rng.choice((True, False, 0, 1, 0.5, "false", None, 2))
    return json.dumps(record)


def meta(rng: random.Random, record: Record) -> str:
    value = rng.choice((*ODD_VALUES, "Jane Miller"))
    return json.dumps({**record, "meta": {rng.choice(META_KEYS): rng.choice((value, [value], {"b": value}))}})


def turns(rng: random.Random, record: Record) -> str:
    kind, some = rng.randrange(7), record["conversations"]
    if kind == 0:
        some.pop(rng.randrange(len(some)))
    elif kind == 1:
        some.append(rng.choice((*ODD_VALUES, {"from": "human", "value": "?"}, {"role": "user", "content": "?"})))
    elif kind == 2:
        rng.choice(some).pop(rng.choice(("from", "value")))
    elif kind == 3:
        rng.choice(some)["from"] = rng.choice(("system", "doctor", "GPT", "", None, 1, "human"))
    elif kind == 4:
        rng.choice(some)["value"] += " <image>"
    elif kind == 5:
        some.insert(0, {"from": "gpt", "value": "Hello."})
    else:
        some.clear()
    return json.dumps(record)


def image(rng: random.Random, record: Record) -> str:
    names = (
        "no.png",
        "../a.png",
        "/a.png",
        "a.png",
        "A.PNG",
        "a\0.png",
        "a" * 5000,
        "s3://a/a.png",
        ".",
        "data:,x",
        "b.png",
    )
    region = {"file": "a.png", "x": 0, "y": 0, "width": 8, "height": 8, rng.choice(("w", "level", "score")): 10**12}
    return json.dumps({**record, "image": rng.choice((*names, region, ["a.png", rng.choice(names)]))})


def harmless(rng: random.Random, record: Record) -> str:
    """What is odd and may be."""
    turn = record["conversations"][0]
    more = rng.choice(({"system": None}, {"images": []}, {"hint": [{}]}, {"Jane Miller": 1}, {"meta": {"a": [[[]]]}}))
    turn |= rng.choice(({}, {"loss": False}, {"weight": 0}, {"score": "x"}, {"Jane": 1}, {"train": None}))
    turn["value"] += rng.choice(("", " [1]", " <b>", "\r\n", "\0", " p<0.05", " (image 1)", " </s>"))
    return json.dumps({**record, **more})


def damaged(rng: random.Random, record: Record) -> str:
    """A letter of its JSON is another one, is gone or comes twice."""
    text = json.dumps(record)
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(("", text[at] * 2, rng.choice('{}[]",:\\\0 x1'))) + text[at + 1 :]


FAULTS: tuple[Callable[[random.Random, Record], str], ...]
FAULTS = (odd_value, odd_text, odd_words, lookalike, other_key, twice, flag, meta, turns, image, harmless, harmless)


def make(num: int, seed: int, lines: bool) -> tuple[list[str], Counter[str]]:
    """Records as texts, and how many of each kind; damage of brackets, which ends a list, in lines only."""
    rng, kinds, texts = random.Random(seed), Counter[str](), []
    for number in range(num):
        record = good(rng, number)
        fault = rng.choice((*FAULTS, damaged) if lines else FAULTS)
        if number % DEEP_SHARE == 0:
            fault = deep
        kinds[fault.__name__] += 1
        texts.append(fault(rng, record).replace("\n", " "))
    return texts, kinds


def fuzz(folder: Path, num: int, seed: int, lines: bool, workers: int = 1) -> dict[str, Any]:
    """Convert that many and read what is accepted back; an `AssertionError` says what was passed over."""
    texts, kinds = make(num, seed, lines)
    images = folder / "imgs"
    images.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16), (200, 120, 180)).save(images / name)
    data = folder / ("data.jsonl" if lines else "data.json")
    data.write_text(
        "\n".join(texts) if lines else "[" + ",\n".join(texts) + "]", encoding="utf-8", errors="surrogatepass"
    )
    summary = convert(data, images, folder / "out", on_error="skip", workers=workers)
    rows = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    refused = {row["record"] for row in rows}
    assert all(row["rule"] in RULES and "Miller" not in row["where"] + row["found"] + row["fix"] for row in rows)
    assert summary.records + len(refused) == num and summary.rejected == len(refused)
    trained = read_back(folder / "out", summary.records)
    rules = Counter(rule for _, rule in {(row["record"], row["rule"]) for row in rows})
    figures = {"records": num, "accepted": summary.records, "read back with labels": trained, "refused": len(refused)}
    return {**figures, "by rule": dict(rules.most_common()), "made": dict(kinds.most_common())}


def read_back(shards: Path, num: int) -> int:
    """Read all samples through the training's dataset; each must have labels."""
    dataset = ConversationDataset(
        tokenizer=train_byte_level_tokenizer(),
        num_image_tokens=2,
        image_size=28,
        template="llava_llama_2",
        max_seq_len=20_000,
        local=str(shards),
        batch_size=1,
    )
    assert len(dataset) == num
    for index in range(num):
        sample = dataset[index]
        assert sample["problem"] is None and bool((sample["labels"] >= 0).any()), (index, sample["problem"])
    return num


def main() -> None:
    """Write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "seed": options.seed}
    for name, lines in (("list", False), ("lines", True)):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result[name] = fuzz(Path(folder), options.num // 2, options.seed + lines, lines)
        result[name]["seconds"] = round(time.perf_counter() - start, 1)
    result["peak MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
