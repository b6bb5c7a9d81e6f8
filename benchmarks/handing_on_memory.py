"""Memory of reading and handing on a whole model: a fresh process's peak over its imports, against the model's size.

python -m benchmarks.handing_on_memory [--layers N] [--again] [--only load]     (default: 18 layers, 1.6 GB in fp32)

A LLaMA of width 1024 beside a small CLIP, random. Pages of mapped files count as the process's own, as long as they are
held. `--again` keeps the models that an earlier call made in /tmp.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, write_result

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = REPOSITORY / "test_data" / "tokenizer"
VISION = {
    "name": "timm/vit_base_patch16_clip_quickgelu_224.openai",
    "image_size": 64,
    "tokens": "patches",
    "kwargs": {"embed_dim": 256, "depth": 4, "num_heads": 4, "final_norm": False, "norm_eps": 1e-5},
}
LIMITS = {"load": 1.2, "start": 1.2, "export": 1.3, "hand on": 1.3}


def language(layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }


def make(folder: Path, layers: int) -> None:
    """The model as an exported folder, in shards and in one file, and as checkpoints of both kinds with their YAML."""
    import torch
    import torch.distributed.checkpoint as dcp
    from omegaconf import OmegaConf

    from composer_path.checkpoints.manifest import MANIFEST  # noqa: F401
    from composer_path.images.pixels import ImagePreparation, pad_color_of
    from composer_path.records.prompts import get_template
    from composer_path.records.tokenize import TextPreparation
    from composer_path.records.vocabulary import load_tokenizer
    from composer_path.run.export import write_model
    from composer_path.weights.assembly import assemble_model

    trainable = ["vision_encoder", "projector", "language_model"]
    sections: dict[str, Any] = {
        "vision_encoder": VISION,
        "projector": {"type": "mlp2x_gelu"},
        "language_model": {"config": language(layers)},
    }
    model = assemble_model(**sections, trainable=trainable, attention="sdpa")
    text = TextPreparation(get_template("llava_llama_2"), model.num_image_tokens(), 512)
    images = ImagePreparation(64, pad_color=pad_color_of(model.vision_encoder.mean))
    write_model(folder / "one", model, model.state_dict(), load_tokenizer(TOKENIZER), text, images)
    for file in (folder / "one").iterdir():
        if not file.name.startswith("model"):
            (folder / "shards").mkdir(exist_ok=True)
            (folder / "shards" / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder / "shards", max_shard_size="300MB")
    state = {"state": {"model": {f"model.{name}": value for name, value in model.state_dict().items()}}}
    (folder / "run" / "checkpoints").mkdir(parents=True)
    dcp.save(state, checkpoint_id=folder / "run" / "checkpoints" / "sharded", no_dist=True)
    torch.save(state, folder / "run" / "checkpoints" / "whole.pt")
    config: Any = OmegaConf.load(REPOSITORY / "yamls" / "demo" / "finetune.yaml")
    del config.model.projector
    config = OmegaConf.to_container(config)
    config["model"] = {**sections, "trainable": trainable, "attention": "sdpa"}
    config["optimizer"] = {**config["optimizer"], "lr": 1e-3}
    config["tokenizer"] = {"path": str(TOKENIZER)}
    OmegaConf.save(OmegaConf.create(config), folder / "run" / "config.yaml")


def load(folder: Path, kind: str) -> Any:
    from composer_path.weights.model_folder import PathMLLM

    return PathMLLM.from_pretrained(folder / kind)


def start(folder: Path, kind: str) -> Any:
    from composer_path.weights.assembly import assemble_model
    from composer_path.weights.whole_folder import sections_of

    sections: dict[str, Any] = sections_of(folder / kind)
    return assemble_model(**sections, trainable=["projector", "language_model"], attention="sdpa")


def export(folder: Path, kind: str) -> Any:
    from composer_path.config.reading import load_config
    from composer_path.run.export import export_checkpoint

    config = load_config(folder / "run" / "config.yaml")
    dtype = "bf16" if kind.endswith("bf16") else None
    return export_checkpoint(folder / "run" / "checkpoints" / kind.split()[0], config, folder / "out", dtype)


def hand_on(folder: Path, kind: str) -> Any:
    from composer_path.handing_on.shapes import SHAPES
    from composer_path.handing_on.trained_model import of_folder

    SHAPES[kind](folder / f"as_{kind}", of_folder(folder / "one"), None)


WORK: dict[str, tuple[Callable[[Path, str], Any], tuple[str, ...]]] = {
    "load": (load, ("one", "shards")),
    "start": (start, ("one", "shards", "as_llava-hf")),
    "export": (export, ("sharded", "whole.pt", "sharded bf16")),
    "hand on": (hand_on, ("llava-hf", "language-model")),
}


def resident(field: str) -> float:
    """What Linux says about this process, bytes: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024.0


def peak(folder: Path, what: str, kind: str) -> float:
    """Bytes over the imports."""
    import onnx  # noqa: F401  # what a shape may import isn't the model

    import composer_path.handing_on.shapes
    import composer_path.train  # noqa: F401
    from composer_path.config.reading import load_config

    load_config(folder / "run" / "config.yaml")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kept = WORK[what][0](folder, kind)
    found = resident("VmHWM") - before
    del kept
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", choices=tuple(LIMITS), help="measure these alone")
    parser.add_argument("--peak", nargs=3, metavar=("FOLDER", "WHAT", "KIND"))
    parser.add_argument("--make", type=Path)
    options = parser.parse_args()
    if options.make:
        return make(options.make, options.layers)
    if options.peak:
        folder, what, kind = options.peak
        return print(json.dumps(peak(Path(folder), what, kind)))
    command = [sys.executable, "-m", "benchmarks.handing_on_memory"]
    kept = Path(tempfile.gettempdir(), "handing_on_memory")
    if not (options.again and kept.is_dir()):
        subprocess.run([*command, "--make", str(kept), "--layers", str(options.layers)], cwd=REPOSITORY, check=True)
    size = (kept / "one" / "model.safetensors").stat().st_size
    rows = []
    order = ["load", "export", "hand on", "start"]
    for what in order if options.only is None else [options.only]:
        for kind in WORK[what][1]:
            words = [*command, "--peak", str(kept), what, kind]
            found = float(subprocess.run(words, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE).stdout)
            rows.append({"what": what, "from or to": kind, "peak": round(found / size, 2), "limit": LIMITS[what]})
            print(rows[-1], flush=True)
    if options.only is not None:  # the other rows stay as they were measured
        before = json.loads((RESULTS / "handing_on_memory.json").read_text(encoding="utf-8"))["rows"]
        rows = [row for row in before if row["what"] != options.only] + rows
    write_result("handing_on_memory", {"model_gb": round(size / 1e9, 2), "rows": rows})


if __name__ == "__main__":
    main()
