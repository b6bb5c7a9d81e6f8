"""Run by vLLM's own Python: answers of a folder to prompts of a JSON file, token by token; no test itself.

Usage: vllm_answers.py ROUTE FOLDER PROMPTS OUT, where ROUTE is one of embeds, ids, chat.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any


def main(route: str, folder: str, prompts: str, out: str) -> None:
    import torch
    from PIL import Image
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(prompts).read_text(encoding="utf-8"))
    keywords: dict[str, Any] = {
        "model": folder,
        "dtype": "float32",
        "max_model_len": asked["max_model_len"],
        "enforce_eager": True,
        "max_num_seqs": 8,
        "seed": 0,
        "enable_prefix_caching": False,
    }
    keywords |= {"enable_prompt_embeds": True} if route == "embeds" else {"limit_mm_per_prompt": {"image": 4}}
    llm = LLM(**keywords)
    sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], stop_token_ids=asked["end_ids"])
    if route == "embeds":
        rows = torch.load(asked["embeds"], weights_only=True)
        answers = llm.generate([{"prompt_embeds": row} for row in rows], sampling)
    elif route == "ids":
        inputs: list[Any] = []
        for ids, files in zip(asked["ids"], asked["images"], strict=True):
            pictures = [Image.open(file) for file in files]
            inputs.append({"prompt_token_ids": ids} | ({"multi_modal_data": {"image": pictures}} if pictures else {}))
        answers = llm.generate(inputs, sampling)
    else:
        answers = llm.chat([_with_files(messages) for messages in asked["messages"]], sampling)
    found = [{"prompt": list(one.prompt_token_ids or []), "answer": list(one.outputs[0].token_ids)} for one in answers]
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def _with_files(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose images are named by file, with data URLs instead."""
    told = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image_url":
                data = base64.b64encode(Path(part["image_url"]["url"]).read_bytes()).decode()
                part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
            parts.append(part)
        told.append({"role": message["role"], "content": parts})
    return told


if __name__ == "__main__":
    main(*sys.argv[1:])
