"""What a GPU gives at best: products of matrices, copies, and the vision encoder by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from composer_path import build_vision_encoder


def run(task: dict[str, Any]) -> dict[str, float]:
    """TFLOP/s of a bf16 product, GB/s of a copy within the device and from the host, images/s of a ViT-L/16 at 448 px.

    Args:
        task: `tiny`, small sizes for a machine without a GPU.
    """
    tiny = task["tiny"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, copied = (256, 1 << 20) if tiny else (8192, 1 << 30)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.empty(copied, dtype=torch.uint8, pin_memory=device.type == "cuda")
    vit: dict[str, Any] = {"kwargs": {"embed_dim": 64, "depth": 2, "num_heads": 1}} if tiny else {}
    with torch.device(device):
        encoder = build_vision_encoder("coca_vit-l", image_size=64 if tiny else 448, **vit).to(torch.bfloat16)
    images = torch.randn(2 if tiny else 32, 3, encoder.image_size, encoder.image_size, device=device)
    with torch.no_grad():
        return {
            "matmul_tflops": 2 * size**3 / seconds(lambda: a @ a) / 1e12,
            "device_copy_gb_per_s": 2 * copied / seconds(lambda: target.copy_(source)) / 1e9,
            "host_copy_gb_per_s": copied / seconds(lambda: target.copy_(host, non_blocking=True)) / 1e9,
            "vision_images_per_s": len(images) / seconds(lambda: encoder(images)),
        }


def seconds(call: Callable[[], Any], repetitions: int = 10) -> float:
    """Of one call, after two that aren't counted."""
    for _ in range(2):
        call()
    wait_for_device()
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    wait_for_device()
    return (time.perf_counter() - start) / repetitions


def wait_for_device() -> None:
    """Until everything that was started is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
