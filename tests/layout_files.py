"""Made files of exactly the public layouts, with tiny pictures; nothing of the sets themselves."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_slide import tiny_slide_levels, write_tiny_slide

COLORS = {"a.png": (200, 120, 180), "b.png": (90, 60, 150)}


def png(color: tuple[int, int, int] = (200, 120, 180)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), color).save(file, "PNG")
    return file.getvalue()


def image_folder(folder: Path) -> Path:
    """Two pictures, ARCH's two in its own folder, one of REG, and a slide."""
    (folder / "images").mkdir(parents=True)
    for name, color in COLORS.items():
        (folder / name).write_bytes(png(color))
    (folder / "images" / "0f-a.png").write_bytes(png())
    (folder / "images" / "0f-b.PNG").write_bytes(png((1, 2, 3)))
    (folder / "PIT_01.tiff").write_bytes(png())
    write_tiny_slide(folder / "TCGA-AA-3844-01Z-00-DX1.svs", tiny_slide_levels())
    return folder


def turns(role: str = "from", text: str = "value", human: str = "human", gpt: str = "gpt") -> list[dict[str, str]]:
    return [{role: human, text: "<image>\nWhich tissue?"}, {role: gpt, text: "Colon."}]


CHOICE = {"question": "Which tissue?", "options": ["A) Colon", "B) Lung"], "answer": "B) Lung"}
CAPTION = 'Colonic mucosa, "H&E",\nwith crypts.'
STEPS = [
    {"question": "Which organ?", "answer": "Colon.", "next_question": "Is it malignant?"},
    {"question": "Is it malignant?", "answer": "No.", "next_question": None},
]

# Name of a file -> its rows, of the layout that its name says.
JSON_FILES: dict[str, Any] = {
    "llava.json": [{"id": "1", "image": "a.png", "conversations": turns()}],
    "pathgen-instruct.json": [{"id": "1", "type": "OPEN", "image": "a.png", "conversations": turns()}],
    "sharegpt.json": [{"conversations": turns(), "images": ["a.png"], "system": "Be brief."}],
    "messages.jsonl": [{"messages": turns("role", "content", "user", "assistant"), "images": ["a.png"]}],
    "role-conversations.json": [
        {"image": "a.png", "conversations": turns("role", "content", "user", "assistant")},
    ],
    "openai.jsonl": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "Which tissue?"},
                    ],
                },
                {"role": "assistant", "content": "Colon.", "weight": 1},
            ]
        }
    ],
    "trl.json": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which tissue?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Colon."}]},
            ],
            "images": ["a.png"],
        }
    ],
    "captions.json": [{"image": "a.png", "caption": CAPTION}],
    "pmc-oa.jsonl": [{"image": "a.png", "caption": CAPTION}],
    "pathgen.json": [
        {"wsi_id": "TCGA-AA-3844-01Z-00-DX1", "position": ["16", "8"], "caption": CAPTION, "file_id": "0"}
    ],
    "pathgen-readme.json": [
        {"WSI_id": "TCGA-AA-3844-01Z-00-DX1", "position": [16, 8], "caption": CAPTION, "file_id": "0"}
    ],
    "arch.json": {
        "0": {"figure_id": "1", "letter": "A", "caption": CAPTION, "uuid": "0f-a"},
        "1": {"figure_id": "1", "letter": "B", "caption": "Lung.", "uuid": "0f-b"},
    },
    "pathvqa.json": [{"image": "a.png", "question": "Which tissue?", "answer": "Colon."}],
    "pathmmu.json": {
        "PubMed": {"val": [{"No": 0, "img": "a.png", **CHOICE, "explanation": "..."}], "test": [], "test_tiny": []},
        "PathCLS": {"val": [{"No": 0, "img": "x.png", "source_img": "b.png", **CHOICE}]},
    },
    "reg.json": [{"id": "PIT_01.tiff", "report": CAPTION}],
    "reg-chains.json": [{"id": "PIT_01.tiff", "chain_of_thought": STEPS}],
}
_OPTIONS = {"Choice A": " A:Colon ", "Choice B": " B:Lung ", "Choice C": " C:Skin ", "Choice D": " D:Liver "}
TABLES: dict[str, list[dict[str, Any]]] = {
    "captions.csv": [{"image": "a.png", "caption": CAPTION}],
    "reports.tsv": [{"filename": "a.png", "report": CAPTION}],
    "quilt-1m.csv": [
        {"": 0, "caption": CAPTION, "image_path": "a.png", "subset": "quilt", "split": "train", "magnification": "1.0"},
        {"": 1, "caption": "Lung.", "image_path": "b.png", "subset": "pubmed", "split": "train", "magnification": ""},
    ],
    "pmc-vqa.csv": [
        {"Figure_path": "a.png", "Question": " Which tissue? ", "Answer": "Lung", **_OPTIONS, "Answer_label": "B"}
    ],
    "vlmevalkit.tsv": [
        {
            **{"index": 0, "image": base64.b64encode(png()).decode(), "question": "Which tissue?"},
            **{"A": "Colon", "B": "Lung", "C": "", "answer": "B", "category": "PubMed"},
        }
    ],
}


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_file(folder: Path, name: str) -> Path:
    """Write one of the files above."""
    path = folder / name
    if name in TABLES:
        return write_table(path, TABLES[name])
    rows = JSON_FILES[name]
    lines = (json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")
    return path
