"""The records of the small training set: questions, answers and captions, balanced by answer."""

from __future__ import annotations

import itertools
import random
from typing import Any

import wording
from tiles import DARK, EMPTY, NUCLEI_GAP, PAIR_GAP, PALE, PICTURES, STAIN_NEEDS, Tile, classify, side

SEED = 7
# How many records of each kind are made for each answer.
PER_ANSWER = {
    "train": {
        "tissue": 30, "stain": 18, "field": 20, "tone": 20, "channel": 18, "nuclei_class": 4,
        "letter": 12, "pair_tissue": 9, "pair_nuclei": 6,
    },
    "heldout": {
        "tissue": 12, "stain": 10, "field": 10, "tone": 9, "channel": 9, "nuclei_class": 4,
        "letter": 6, "pair_tissue": 6, "pair_nuclei": 4,
    },
}  # fmt: skip
NUM_DIALOGUES = {"train": 24, "heldout": 8}
NUM_DESCRIPTIONS = {"train": 24, "heldout": 8}


class Records:
    """Writes the records of one side of the split."""

    def __init__(self, tiles: list[Tile], split: str, rng: random.Random):
        self.tiles = [tile for tile in tiles if tile.split == split]
        self.split, self.rng = split, rng
        self.count = PER_ANSWER[split]

    def all_instructions(self) -> list[dict[str, Any]]:
        """Returns the records of stage 2 in a shuffled order."""
        records = [record for kind in wording.CLOSED for record in self.closed(kind)]
        records += self.letters() + self.pairs("pair_tissue") + self.pairs("pair_nuclei")
        records += self.dialogues() + self.descriptions()
        if self.split == "train":
            records += self.text_only()
        self.rng.shuffle(records)
        return self._finish(records)

    def captions(self) -> list[dict[str, Any]]:
        """Returns the records of stage 1: a caption for every tile."""
        return self._finish(
            [self._caption_record("caption", tile, i, wording.TAG_FIRST) for i, tile in enumerate(self.tiles)]
        )

    def closed(self, kind: str) -> list[dict[str, Any]]:
        """Returns closed questions of one kind, equally many for either answer."""
        question = wording.CLOSED[kind]
        records = []
        for answer in question.options:
            for i, tile in enumerate(self._draw(kind, answer, self.count[kind])):
                tag = (wording.TAG_FIRST, wording.TAG_LAST)[i % 2]
                if self.split == "train" and kind == "tissue" and i == 0:
                    tag = "{}"  # one picture without a tag is allowed: it stands before the first question
                turns = [(tag.format(question.ask(i)), answer)]
                records.append(self._record(kind, [tile], turns, question.options, answer))
        return records

    def letters(self) -> list[dict[str, Any]]:
        """Returns multiple-choice questions: either option stands under either letter equally often."""
        records = []
        for i in range(self.count["letter"] * 2):
            kind = list(wording.MULTIPLE_CHOICE)[i // 4 % 3]
            stem, names = wording.MULTIPLE_CHOICE[kind]
            options = list(names)
            right = options[i % 2]
            shown = options if i // 2 % 2 == 0 else options[::-1]
            labelled = zip(wording.LETTERS, shown, strict=True)
            lines = [f"{letter}. {names[option]}" for letter, option in labelled]
            answer = wording.LETTERS[shown.index(right)]
            text = "\n".join(["<image>", stem, *lines, "Answer with the letter only."])
            tile = self._draw(kind, right, self.count["letter"] // 3)[i // 4 // 3]
            records.append(self._record("letter", [tile], [(text, answer)], wording.LETTERS, answer))
        return records

    def pairs(self, kind: str) -> list[dict[str, Any]]:
        """Returns two-picture questions; each pair is asked in both orders."""
        if kind == "pair_tissue":
            tiles = [t for t in self.tiles if t.picture == "cmu"]
            value = {t.file: t.facts["tissue_share"] for t in tiles}
            least = PAIR_GAP
        else:
            tiles = [t for t in self.tiles if "nuclei" in t.facts]
            value = {t.file: sum(t.facts["nuclei"].values()) for t in tiles}
            least = NUCLEI_GAP
        pairs = itertools.combinations(tiles, 2)
        clear = [(a, b) for a, b in pairs if abs(value[a.file] - value[b.file]) >= least]
        records = []
        for i, (a, b) in enumerate(self.rng.sample(clear, self.count[kind])):
            for first, second in ((a, b), (b, a)):
                answer = wording.PAIR_OPTIONS[int(value[second.file] > value[first.file])]
                turns = [(wording.PAIRS[kind][i % len(wording.PAIRS[kind])], answer)]
                records.append(self._record(kind, [first, second], turns, wording.PAIR_OPTIONS, answer))
        return records

    def dialogues(self) -> list[dict[str, Any]]:
        """Returns conversations of several turns about one tile."""
        records = []
        for i, tile in enumerate(self._spread(NUM_DIALOGUES[self.split])):
            picture = PICTURES[tile.picture]
            turns = [(wording.CLOSED["stain"].ask(i), wording.SHORT_STAIN[picture.stain])]
            if (amount := classify(tile, "tissue")) is not None:
                turns.append((wording.CLOSED["tissue"].ask(i), amount))
            turns.append((wording.HOW_MUCH[i % 3], _sentence(f"{self._percent(tile)}.")))
            extra = [(wording.ORGAN_QUESTION[i % 3], wording.ORGAN_ANSWER[tile.picture])]
            if tile.picture == "cmu":
                extra.append((wording.SCALE_QUESTION, wording.SCALE_ANSWER))
                extra.append((wording.DIAGNOSIS_QUESTION[i % 2], wording.DIAGNOSIS_ANSWER))
            if tile.picture == "ihc":
                extra.append((wording.MARKER_QUESTION, wording.MARKER_ANSWER))
            turns.append(extra[i // 4 % len(extra)])
            turns[0] = ((wording.TAG_FIRST, wording.TAG_LAST)[i % 2].format(turns[0][0]), turns[0][1])
            records.append(self._record("dialogue", [tile], turns))
        return records

    def descriptions(self) -> list[dict[str, Any]]:
        """Returns requests for a caption, as instructions."""
        tiles = self._spread(NUM_DESCRIPTIONS[self.split])
        return [self._caption_record("description", tile, i, wording.TAG_LAST) for i, tile in enumerate(tiles)]

    def text_only(self) -> list[dict[str, Any]]:
        """Returns records without a picture."""
        records = []
        for system, question, answer in wording.TEXT_ONLY:
            record = self._record("text", [], [(question, answer)])
            if system:
                record["system"] = system
            records.append(record)
        return records

    def _draw(self, kind: str, answer: str, number: int) -> list[Tile]:
        fitting = [tile for tile in self.tiles if classify(tile, kind) == answer]
        if kind != "nuclei_class":
            fitting = [tile for tile in fitting if "nuclei" not in tile.facts]
        order = random.Random(f"{SEED} {self.split} {kind} {answer}")
        order.shuffle(fitting)
        if not fitting:
            raise ValueError(f"no {self.split} tile has the answer {answer!r} to {kind!r}: keep more TILES")
        return list(itertools.islice(itertools.cycle(fitting), number))

    def _spread(self, number: int) -> list[Tile]:
        """Tiles of all pictures in turn."""
        visible = [tile for tile in self.tiles if tile.facts["tissue_share"] >= STAIN_NEEDS]
        by_picture = [[t for t in visible if t.picture == name and "nuclei" not in t.facts] for name in PICTURES]
        drawn = [self.rng.sample(tiles, -(-number // len(PICTURES))) for tiles in by_picture]
        return [tile for group in zip(*drawn, strict=True) for tile in group][:number]

    @staticmethod
    def _percent(tile: Tile) -> str:
        share = tile.facts["tissue_share"]
        if share < 0.05:
            return "less than 5 %"
        return "more than 95 %" if share > 0.95 else f"about {round(share * 10) * 10} %"

    def _caption(self, tile: Tile, number: int) -> str:
        stain = PICTURES[tile.picture].stain
        if "nuclei" in tile.facts:
            return wording.NUCLEI_CAPTION.format(stain=stain, **tile.facts["nuclei"])
        share = tile.facts["tissue_share"]
        if share < EMPTY:  # neither stain nor source can be seen on empty glass
            return wording.EMPTY_CAPTIONS[number % len(wording.EMPTY_CAPTIONS)]
        text = wording.CAPTIONS[number % len(wording.CAPTIONS)].format(
            stain=stain,
            stain_name=wording.STAIN_NAME[stain],
            amount=next(words for limit, words in wording.AMOUNTS if share < limit),
            tone=side(tile.facts["luminance"], DARK, PALE, "dark", "pale") or "medium-bright",
            percent=self._percent(tile),
        )
        tail = " " + wording.CAPTION_TAILS[tile.picture] if number % 2 else ""
        return _sentence(text) + tail

    def _caption_record(self, kind: str, tile: Tile, number: int, tag: str) -> dict[str, Any]:
        question = wording.DESCRIBE[number % len(wording.DESCRIBE)]
        return self._record(kind, [tile], [(tag.format(question), self._caption(tile, number))])

    def _record(
        self,
        kind: str,
        tiles: list[Tile],
        turns: list[tuple[str, str]],
        options: tuple[str, ...] | None = None,
        answer: str | None = None,
    ) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if tiles:
            pictures = list(dict.fromkeys(tile.picture for tile in tiles))
            known = [PICTURES[name] for name in pictures]
            record["image"] = tiles[0].file if len(tiles) == 1 else [tile.file for tile in tiles]
            record["source"] = "+".join(pictures)
            record["patient"] = "+".join(picture.patient for picture in known)
            record["stain"] = known[0].stain  # pairs are made within a stain
            if all(picture.organ for picture in known):
                record["organ"] = "; ".join(str(picture.organ) for picture in known)
            if known[0].mpp is not None:
                record["mpp"], record["magnification"] = known[0].mpp, known[0].magnification
        record["conversations"] = [
            {"from": speaker, "value": text}
            for turn in turns
            for speaker, text in zip(("human", "assistant"), turn, strict=True)
        ]
        record["meta"] = {"split": self.split, "kind": kind, "regions": [list(tile.region) for tile in tiles]}
        if options:
            record["meta"] |= {"options": list(options), "answer": answer}
        return record

    def _finish(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Numbers the records, and names the roles as other public sets do in every fifth of them."""
        for number, record in enumerate(records):
            if number % 5 == 4:
                other = {"human": "human" if number % 10 == 4 else "user", "assistant": "gpt"}
                for turn in record["conversations"]:
                    turn["from"] = other[turn["from"]]
        return [{"id": f"{self.split}-{record['meta']['kind']}-{i:03}"} | record for i, record in enumerate(records)]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
