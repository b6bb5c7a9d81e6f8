"""A process without this package, and without what only training needs: loads a self-contained folder and asks it.

    python stranger.py FOLDER PICTURE QUESTION OUT

It writes ids, logits and answers as JSON into the folder OUT, and what transformers saves of the model beside them.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from typing import Any

LACKING = {"composer_path", "composer", "streaming", "omegaconf", "jaxtyping", "open_clip", "simplejpeg", "openslide"}
LACKING |= {"xxhash", "peft", "flash_attn"}


class Finder(PathFinder):
    """Python's own, but for what is lacking."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        return None if fullname.partition(".")[0] in LACKING else super().find_spec(fullname, path, target)


def main(folder: str, picture: str, question: str, out: Path) -> None:
    """Load with each of transformers' doors, ask, save, load again, ask again."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

    parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    found: dict[str, Any] = {
        "num_image_tokens": AutoConfig.from_pretrained(folder, trust_remote_code=True).num_image_tokens
    }

    def ask(place: str) -> dict[str, Any]:
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(place, trust_remote_code=True)
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        new = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        if place == folder:
            model.save_pretrained(out / "saved")
            processor.save_pretrained(out / "saved")
            door = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
            said = door(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
            found["pipeline"], found["module"] = said, type(model).__module__
        return {"ids": inputs["input_ids"][0].tolist(), "logits": logits.tolist(), "new": new.tolist()}

    found |= {"first": ask(folder), "again": ask(str(out / "saved"))}
    found["lacking"] = sorted(name for name in LACKING if name in sys.modules)
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]  # an editable installation has a finder of its own
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
