"""What this project replaces, overrides or calls by a private name in a library is what it was written after.

When one differs, compare it with the place named beside it, take over what matters, and write the new number here.
Those of reading shards stand in tests/stream and tests/batches/test_balance.py.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from typing import Any

import open_clip.model
import PIL.Image
import pytest
import torch
from composer.callbacks import SpeedMonitor
from composer.cli import launcher
from composer.core import State, engine
from composer.utils import checkpoint as composers
from open_clip.transformer import VisionTransformer
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _Iterator
from streaming.base.shared import prefix
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.multiprocessing import reductions
from torch.utils.data._utils import collate

# As of mosaicml 0.32.1, mosaicml-streaming 0.13.0, open_clip 3.3.0 and Pillow 11.3 and 13.0.
ORIGINALS: list[tuple[Any, str, str, str]] = [
    (State, "_apply_required_algorithms", "d36696ae3338309a", "checkpoints/gate.py"),
    (composers, "safe_torch_load", "3d4f6dadddf1b48d", "checkpoints/gate.py"),
    (composers.FileSystemReaderWithValidation, "read_data", "9e3e2260a6d6a7b3", "checkpoints/gate.py"),
    (composers.FileSystemReaderWithValidation, "read_metadata", "8b55e1977dc3a705", "checkpoints/gate.py"),
    (State, "_dataset_state_dict", "5d62abc5a4e2f36a", "batches/dataset.py"),
    (State, "_load_dataset_state", "24a0d3f2293485c8", "stream/resume.py"),
    (engine, "sigterm_handler", "1ca25b650c287d1b", "guards/requests.py"),
    (launcher, "_cleanup_processes", "7ff47e7ee870fd0a", "guards/launch.py"),
    (launcher, "_monitor_processes", "1f341ba191b851d5", "guards/launch.py"),
    (SpeedMonitor, "init", "ac943d0c1e352d3a", "callbacks/speed_report.py"),
    (SpeedMonitor, "batch_end", "b3654794acea0e6d", "callbacks/speed_report.py"),
    (StreamingDataset, "__init__", "34032a553e3c5801", "stream/guarded.py"),
    (StreamingDataset, "_evict_shard", "82a72e29eb978e8e", "stream/guarded.py"),
    (StreamingDataset, "_resume", "308faccca0ea5c95", "stream/resume.py"),
    (StreamingDataset, "state_dict", "f43fd0324bbaddc3", "stream/resume.py"),
    (StreamingDataset, "load_state_dict", "05a5e2b2930ea878", "stream/resume.py"),
    (Stream, "__init__", "f64ac00f15d8d23a", "stream/guarded_stream.py"),
    (Stream, "apply_default", "8523d06bbde47d87", "stream/guarded.py"),
    (prefix, "_check_and_find_retrying", "c28da7813c7ee18b", "stream/shared_prefix.py"),
    (prefix, "_check_self", "4438414b233ebf1f", "stream/shared_prefix.py"),
    (prefix, "_get_path", "98a13aabf7d2dbf0", "stream/shared_prefix.py"),
    (prefix, "_pack_locals", "95a0941523a8b62d", "stream/shared_prefix.py"),
    (prefix, "_unpack_locals", "e25dc8bf7d3be211", "stream/cache.py"),
    (VisionTransformer, "_embeds", "febfa3af001b3dea", "models/open_clip_trunk.py"),
    (VisionTransformer, "_pool", "70a1898058e39177", "models/open_clip_trunk.py"),
    (VisionTransformer, "forward", "03375262de231b7e", "models/open_clip_trunk.py"),
    (open_clip.model, "_build_vision_tower", "a91efa2f446b093d", "models/open_clip_trunk.py"),
    (PIL.Image, "_getdecoder", "c90c8be654426706", "images/jpeg.py"),
]
# torch's own, by its version.
OF_TORCH: list[tuple[Any, str, dict[str, str], str]] = [
    (
        collectives,
        "_get_gradient_divide_factors",
        {"2.7": "f4d09ec265dcf5d9", "2.14": "387c88a407094fa7"},
        "run/sharding.py",
    ),
    (
        FileSystemReader,
        "read_data",
        {"2.7": "47234959cff8ed2e", "2.14": "86ad890ac621f4f5"},
        "checkpoints/guarded.py",
    ),
    (
        DefaultLoadPlanner,
        "load_bytes",
        {"2.7": "666701f9808c4bc2", "2.14": "666701f9808c4bc2"},
        "checkpoints/guarded.py",
    ),
    (
        nn.Module,
        "register_parameter",
        {"2.7": "d521bf37db48edaa", "2.14": "eefb7990f204ed62"},
        "models/language_model.py",
    ),
    (nn.Module, "_apply", {"2.7": "a5683790d11d20cb", "2.14": "03825365d7465fbb"}, "planning/step_memory.py"),
]


def digest(owner: Any) -> str:
    return hashlib.sha256(inspect.getsource(owner).encode()).hexdigest()[:16]


def digest_of_method(owner: Any, name: str) -> str:
    """As its class has it in its file: another test may have had the method replaced."""
    if not inspect.isclass(owner):
        return digest(getattr(owner, name))
    lines = inspect.getsource(owner).splitlines(keepends=True)
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(tree, ast.ClassDef)
    node = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return hashlib.sha256("".join(lines[start - 1 : node.end_lineno]).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("owner", "name", "expected", "ours"), ORIGINALS, ids=[f"{owner.__name__}.{name}" for owner, name, *_ in ORIGINALS]
)
def test_a_library_is_what_ours_was_written_after(owner: Any, name: str, expected: str, ours: str) -> None:
    assert digest_of_method(owner, name) == expected, f"compare with composer_path/{ours}"


@pytest.mark.parametrize(("owner", "name", "expected", "ours"), OF_TORCH, ids=[name for _, name, *_ in OF_TORCH])
def test_torch_is_what_ours_was_written_after(owner: Any, name: str, expected: dict[str, str], ours: str) -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in expected:
        pytest.skip(f"known for torch {' and '.join(expected)}")
    assert digest_of_method(owner, name) == expected[version], f"compare with composer_path/{ours}"


def test_streamings_loop_has_the_places_that_ours_reads() -> None:
    assert digest(_Iterator) == "ab33a14a12152f39", "compare with composer_path/stream/guarded.py"


def test_torch_shares_a_batchs_memory_by_the_names_that_sending_takes() -> None:
    assert "_new_shared(numel" in inspect.getsource(collate.collate_tensor_fn)
    assert "fd, size = storage._share_fd_cpu_()" in inspect.getsource(reductions.reduce_storage)
