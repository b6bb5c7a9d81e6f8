"""What the loader does with an image: the reference's way against ours, and MDS against a plain folder.

python -m benchmarks.loader_speed [--quick] [--repetitions N] [--images FOLDER]

Measured twice, as CPU time, each variant in a process of its own, in an order that is shuffled anew each repetition.
"image path": the work of one loader worker on records and images alone, in this process, no texts, after a first epoch,
in which each shard's checksum is computed; what that one takes stands beside it. "whole loader": the first three epochs
of a torch DataLoader with one worker, its start included, where ours are complete `ConversationDataset`s and
`PackedCollator` (the reference's texts are tokenized and padded, too) and the way from the worker to the training
process counts; "after the first epoch" leaves out what is done once, the start and the checksums. The reference's way
reads a folder, decodes with PIL, pads to a square, resizes bicubically and normalises to float. Pixels are compared
before anything is timed.
`COMPOSER_PATH_HISTOLOGY` may name a folder of pictures to crop; `--images` keeps the crops for another run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.convert_speed import REPOSITORY, write_records
from benchmarks.measure import interleaved, paired_ratio, print_table, spread, write_result
from benchmarks.tissue_images import QUALITY, SIDE, write_tissue_images
from composer_path.images.pixels import IMAGE_MEAN, IMAGE_STD, PAD_COLOR, ImagePreparation, normalize_image
from composer_path.shards.columns import unpack_images

IMAGE_SIZE, NUM_IMAGE_TOKENS, BATCH_SIZE = 448, 128, 8
TOKENIZER = REPOSITORY / "test_data" / "tokenizer"
REFERENCE, PIL, TORCHVISION, RESIZED = "reference's way", "decoder: pil", "decoder: torchvision", "--resize 448"
FOLDER, MDS = "folder, bytes only", "MDS, bytes only"
LEAST = "libjpeg and resize alone"  # what `decoder: torchvision` can't do without
VARIANTS = (REFERENCE, PIL, TORCHVISION, RESIZED, FOLDER, MDS)
EPOCHS = 3  # of the whole loader
IMAGE_PATH, WHOLE_LOADER = "image path", "whole loader"
# Ratio of speeds: (variant, compared with, at least)
TARGETS = [(PIL, REFERENCE, 1.1), (TORCHVISION, REFERENCE, 3.5), (RESIZED, REFERENCE, 20.0), (MDS, FOLDER, 1.0)]
LIMITS = [(LEAST, REFERENCE, None)]


class FolderOfFiles(Dataset):
    """Records and the bytes of their image files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = (folder / "data.jsonl").read_text().splitlines()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = json.loads(self.lines[index])
        return {**record, "images": (self.folder / record["image"]).read_bytes()}


class ReferenceImages(FolderOfFiles):
    """Records, and images as LLaVA-like training code prepares them: one float tensor each."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = json.loads(self.lines[index])
        return {**record, "pixel_values": reference_pixels(self.folder / record["image"])[None]}


class LeastImages(FolderOfFiles):
    """Images in memory, through the two libraries without which `decoder: torchvision` has no pixels."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files = [(folder / json.loads(line)["image"]).read_bytes() for line in self.lines]

    def __getitem__(self, index: int) -> dict[str, Any]:
        import simplejpeg
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        whole = torch.from_numpy(simplejpeg.decode_jpeg(self.files[index])).permute(2, 0, 1)
        return {"pixel_values": resize(whole, [IMAGE_SIZE, IMAGE_SIZE], InterpolationMode.BICUBIC, antialias=True)}


class ReferenceSamples(FolderOfFiles):
    """As LLaVA-like training code prepares a record."""

    def __init__(self, folder: Path) -> None:
        from composer_path.records.vocabulary import load_tokenizer

        super().__init__(folder)
        self.tokenizer = load_tokenizer(TOKENIZER)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = json.loads(self.lines[index])
        text = " ".join(turn["value"] for turn in record["conversations"])
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
        return {
            "input_ids": ids,
            "labels": ids.clone(),
            "pixel_values": reference_pixels(self.folder / record["image"])[None],
        }


def reference_square(path: Path) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    if image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), PAD_COLOR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return np.array(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def reference_pixels(path: Path) -> torch.Tensor:
    scaled = reference_square(path).astype(np.float32) / np.float32(255)
    normal = (scaled - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))


def dataset_of(kind: str, name: str, folder: Path) -> Any:
    from composer_path.batches.dataset import ConversationDataset
    from composer_path.records.vocabulary import load_tokenizer
    from composer_path.stream.guarded import GuardedStreamingDataset

    class ShardImages(GuardedStreamingDataset):
        """Records of shards, and their images as the loader prepares them."""

        def get_item(self, sample_id: Any, retry: int = 7) -> Any:
            record = super().get_item(sample_id, retry)
            preparation = ImagePreparation(IMAGE_SIZE, decoder="torchvision" if name == TORCHVISION else "pil")
            images = [preparation.load_stored(image) for image in unpack_images(record["images"])]
            return {**record, "pixel_values": torch.stack(images)}

    if name in (FOLDER, LEAST):
        return FolderOfFiles(folder) if name == FOLDER else LeastImages(folder)
    if name == REFERENCE:
        return ReferenceImages(folder) if kind == IMAGE_PATH else ReferenceSamples(folder)
    shards = folder / ("resized" if name == RESIZED else "stored")
    streaming: dict[str, Any] = {"local": str(shards), "batch_size": BATCH_SIZE, "shuffle": False}
    if name == MDS:
        return GuardedStreamingDataset(**streaming)
    if kind == IMAGE_PATH:
        return ShardImages(**streaming)
    return ConversationDataset(
        tokenizer=load_tokenizer(TOKENIZER),
        num_image_tokens=NUM_IMAGE_TOKENS,
        image_size=IMAGE_SIZE,
        template="llava_llama_2",
        decoder="torchvision" if name == TORCHVISION else "pil",
        **streaming,
    )


def pad_and_stack(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A padded batch, as LLaVA-like training code makes it."""
    texts = {key: [sample[key] for sample in samples] for key in ("input_ids", "labels")}
    padded = {key: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for key, rows in texts.items()}
    return padded | {"pixel_values": torch.cat([sample["pixel_values"] for sample in samples])}


def bytes_as_they_are(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return samples


def collator_of(name: str) -> Any:
    from composer_path.batches.batch import PackedCollator

    return {REFERENCE: pad_and_stack, FOLDER: bytes_as_they_are, MDS: bytes_as_they_are}.get(name) or PackedCollator()


def run_variant(kind: str, name: str, folder: Path) -> dict[str, float]:
    """CPU seconds of all samples, this process and its worker; called in a process of its own."""
    import torchvision  # noqa: F401 (not timed)

    from composer_path.batches.loader import start_worker
    from composer_path.parallel import keep_freed_memory

    dataset = dataset_of(kind, name, folder)
    ours = name not in (REFERENCE, FOLDER)  # of the least, only what its worker keeps
    if kind == IMAGE_PATH:
        if ours:
            keep_freed_memory()  # as our workers do
        first = read_once(dataset)
        warm = [read_once(dataset)]
        while sum(warm) < 1:  # s
            warm.append(read_once(dataset))
        return {"cpu": sum(warm) / len(warm), "first_epoch_cpu": first, "samples": len(dataset)}
    settings: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "collate_fn": collator_of(name)}
    if ours:
        settings["worker_init_fn"] = start_worker
    before = os.times()
    count = read_epochs(DataLoader(dataset, batch_size=BATCH_SIZE, **settings))
    whole = sum(os.times()[:4]) - sum(before[:4])
    return {"cpu": whole, "samples": count, "later_epoch_cpu": later_epoch(DataLoader(dataset, BATCH_SIZE, **settings))}


def read_once(dataset: Any) -> float:
    """CPU seconds of all samples in this process."""
    before = time.process_time()
    for index in range(len(dataset)):
        dataset[index]
    return time.process_time() - before


def read_epochs(loader: DataLoader) -> int:
    """Read all epochs; the worker has ended, and its time is known, when they are through. Returns samples read."""
    count = 0
    for _ in range(EPOCHS):
        for batch in loader:
            count += len(samples_of(batch))
    loader._iterator._shutdown_workers()  # type: ignore[union-attr]
    deadline = time.monotonic() + 30
    while torch.multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return count


def later_epoch(loader: DataLoader) -> float:
    """CPU seconds of an epoch after the first, this process and its worker."""

    def cpu() -> float:
        return time.process_time() + sum(sum(one.cpu_times()[:2]) for one in psutil.Process().children())

    sum(1 for _ in loader)
    before, epochs = cpu(), 0
    while not epochs or cpu() - before < 1:  # s; a worker's time is known to a hundredth
        sum(1 for _ in loader)
        epochs += 1
    return (cpu() - before) / epochs


def samples_of(batch: Any) -> Any:
    """What a batch has one of for each sample."""
    if isinstance(batch, dict):
        return batch["pixel_values"]
    return batch if isinstance(batch, list) else batch.sample_ids


def timed(kind: str, name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loader_speed", "--variant", kind, name, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def check_equality(folder: Path, count: int) -> dict[str, Any]:
    """Compare pixels: ours with the reference's, those of resized shards, and torchvision's within one grey level."""
    from composer_path.shards.view import ShardView

    pil, torchvision = ImagePreparation(IMAGE_SIZE), ImagePreparation(IMAGE_SIZE, decoder="torchvision")
    views = {name: ShardView(folder / name) for name in ("stored", "resized")}
    largest = 0
    for position in range(count):
        path = folder / f"{position:05}.jpg"
        square = torch.from_numpy(reference_square(path)).permute(2, 0, 1)
        data = {name: view.sample(position).images[0] for name, view in views.items()}
        exact = pil.load(data["stored"])
        same = torch.equal(exact, square) and torch.equal(normalize_image(exact), reference_pixels(path))
        if not same or not torch.equal(pil.load_stored(data["resized"]), exact):
            raise SystemExit(f"image {position}: pixels aren't the reference's; no time is reported")
        fast = torchvision.load(data["stored"])
        largest = max(largest, int((fast.int() - exact.int()).abs().max()))
    if largest > 1:
        raise SystemExit(f"torchvision's pixels differ by {largest} grey levels; no time is reported")
    return {"images": count, "pil_and_resized_equal_the_reference": True, "torchvision_largest_difference": largest}


def convert_sets(folder: Path) -> None:
    from composer_path.conversion.convert import convert

    resized = {"image_size": IMAGE_SIZE, "fit": "pad", "pad_color": list(PAD_COLOR)}
    for name, options in (("stored", {}), ("resized", {"resized": resized})):
        convert(folder / "data.jsonl", folder, folder / name, check="header", ids="keep", overwrite=True, **options)


def measure(folder: Path, count: int, repetitions: int) -> dict[str, Any]:
    write_tissue_images(folder, count)
    write_records(folder / "data.jsonl", count)
    convert_sets(folder)
    equality = check_equality(folder, min(count, 50))
    kinds = {kind: measure_kind(kind, folder, count, repetitions) for kind in (IMAGE_PATH, WHOLE_LOADER)}
    return {
        "settings": {"images": count, "side": SIDE, "quality": QUALITY, "repetitions": repetitions, "workers": 1}
        | {"epochs": EPOCHS},
        "equality": equality,
        **kinds,
    }


def measure_kind(kind: str, folder: Path, count: int, repetitions: int) -> dict[str, Any]:
    variants = (*VARIANTS, LEAST) if kind == IMAGE_PATH else VARIANTS
    times: dict[str, list[float]] = {name: [] for name in variants}
    beside = "first_epoch_cpu" if kind == IMAGE_PATH else "later_epoch_cpu"
    one_epoch: dict[str, list[float]] = {name: [] for name in variants}
    total = count if kind == IMAGE_PATH else EPOCHS * count
    for _, name in interleaved(variants, repetitions):
        found = timed(kind, name, folder)
        if found["samples"] != total:
            raise SystemExit(f"'{name}': {found['samples']} samples of {total}; no time is reported")
        times[name].append(found["cpu"])
        one_epoch[name].append(found[beside])
    ratios, later = {}, {}
    for name, other, target in [*TARGETS, *(LIMITS if LEAST in times else [])]:
        ratio = paired_ratio(times[other], times[name])
        reached = None if target is None else ratio["median"] >= target
        ratios[f"{name} : {other}"] = {"target": target, "reached": reached, **ratio}
        later[f"{name} : {other}"] = paired_ratio(one_epoch[other], one_epoch[name])
    speeds = {name: round(total / spread(found)["median"], 1) for name, found in times.items()}
    print_table([kind, "samples / CPU s"], list(speeds.items()))
    print_table(["ratio of speeds", "median", "target"], [[n, r["median"], r["target"]] for n, r in ratios.items()])
    result: dict[str, Any] = {"ratios_of_speed": ratios, "samples_per_cpu_second": speeds}
    alone = {name: round(count / spread(seconds)["median"], 1) for name, seconds in one_epoch.items()}
    if kind == IMAGE_PATH:
        result["samples_per_cpu_second_in_the_first_epoch"] = alone
    else:
        print_table(["after the first epoch", "median"], [[name, ratio["median"]] for name, ratio in later.items()])
        result |= {"ratios_of_speed_after_the_first_epoch": later, "samples_per_cpu_second_after_it": alone}
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="60 images, one repetition; writes no result")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--images", type=Path, help="folder that keeps the images for another run")
    parser.add_argument("--variant", nargs=3, metavar=("KIND", "NAME", "FOLDER"), help="used for its child processes")
    options = parser.parse_args(arguments)
    if options.variant:
        kind, name, folder = options.variant
        print(json.dumps(run_variant(kind, name, Path(folder))))
        return
    count, repetitions = (60, 1) if options.quick else (250, options.repetitions)
    folder = options.images or Path(tempfile.mkdtemp())
    try:
        result = measure(folder, count, repetitions)
        if not options.quick:
            print(write_result("loader_speed", result))
    finally:
        if options.images is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
