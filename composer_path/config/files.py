"""What must lie on the disk before a run starts, looked up before anything is built: all that is missing is listed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from composer_path.storage.places import is_remote


def check_start(settings: Mapping[str, Any]) -> list[str]:
    """Problems of files that a configuration names, one a line: key, what was found, what to do.

    Only rank 0 looks for weights, since only rank 0 reads them.

    Args:
        settings: The configuration as plain mappings.
    """
    problems = [*_missing_shards(settings), *_earlier_results(settings)]
    tokenizer = settings["tokenizer"]["path"]
    if not Path(tokenizer).exists():
        problems.append(f"tokenizer.path: found no '{tokenizer}'; give a folder or file of a tokenizer")
    if os.environ.get("RANK", "0") == "0":
        problems += _missing_weights(settings["model"])
    return problems


def check_lengths(settings: Mapping[str, Any]) -> list[str]:
    """Problems of the measured lengths that balanced loaders need, one a line; nothing is looked up without such.

    Args:
        settings: The configuration as plain mappings, of which `check_start` found no problem.
    """
    if not any((settings.get(section) or {}).get("balance") for section in ("train_loader", "eval_loader")):
        return []
    from composer_path.planning.measured_lengths import lengths_problems

    return lengths_problems(settings)


def _missing_shards(settings: Mapping[str, Any]) -> Iterator[str]:
    for section in ("train_loader", "eval_loader"):
        dataset = (settings.get(section) or {}).get("dataset") or {}
        places = {f"{section}.dataset": dataset}
        places |= {
            f"{section}.dataset.streams.{name}": stream for name, stream in (dataset.get("streams") or {}).items()
        }
        for where, keywords in places.items():
            if keywords.get("local") is None or keywords.get("remote") or is_remote(keywords["local"]):
                continue  # an index that lies elsewhere is fetched
            folder = Path(keywords["local"], keywords.get("split") or "")
            if not (folder / "index.json").is_file():
                yield (
                    f"{where}.local: found no index.json in '{folder}'; write shards there with "
                    f"data_prep/convert.py --out {folder}, or name the folder that has them"
                )


def _missing_weights(model: Mapping[str, Any]) -> Iterator[str]:
    for name, key in (("vision_encoder", "weights"), ("projector", "weights"), ("language_model", "path")):
        path = (model.get(name) or {}).get(key)
        if path is not None and not Path(path).exists():
            hint = "run stage 1 first, or give its projector.safetensors" if name == "projector" else "check the path"
            yield f"model.{name}.{key}: found no '{path}'; {hint}"


def _earlier_results(settings: Mapping[str, Any]) -> Iterator[str]:
    trainer = settings["trainer"]
    if trainer.get("autoresume") or trainer.get("save_overwrite") or trainer.get("load_path"):
        return
    folder = Path(settings["save_root"], trainer["run_name"])
    if any((folder / "checkpoints").glob("*")):
        yield (
            f"trainer.run_name: found checkpoints of an earlier run in '{folder}'; choose another run_name or "
            "save_root, or go on where it was with trainer.autoresume=true"
        )
