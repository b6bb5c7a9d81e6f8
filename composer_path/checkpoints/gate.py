"""No checkpoint runs code: each is read by readers of our own, which unpickle nothing.

Composer and torch load checkpoints as full pickles, in which a name is looked up and called. Here a name stands in an
exact list, for a function of ours; see `weights/pickle_values.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import composer.utils.checkpoint
from composer.core import State
from composer.utils.checkpoint import FileSystemReaderWithValidation
from torch.distributed.checkpoint import DefaultLoadPlanner

from composer_path.checkpoints.guarded import GuardedPlanner, GuardedReader
from composer_path.checkpoints.metadata_file import METADATA, read_metadata_file
from composer_path.weights.torch_file import TorchFileError, read_torch_buffer, read_torch_file


def require_safe_checkpoints() -> None:
    """Let whatever reads a checkpoint, Composer and torch's planner included, do so through the gate.

    Raises:
        RuntimeError: This Composer loads in another place than the supported version does.
    """
    os.environ["CHECKPOINT_VALIDATION_FUNCTION"] = "composer_path.checkpoints.gate.is_harmless"
    # Composer evaluates the text of algorithms in a checkpoint to add them; here algorithms come from the YAML alone.
    loaders = (State, "_apply_required_algorithms"), (composer.utils.checkpoint, "_torch_load_with_validation")
    if not all(hasattr(place, name) for place, name in loaders):
        raise RuntimeError("this version of Composer restores checkpoints in an unknown way; use mosaicml 0.32.1")
    State._apply_required_algorithms = lambda self, *args, **kwargs: None  # type: ignore[method-assign]
    validated = composer.utils.checkpoint._ensure_valid_checkpoint
    composer.utils.checkpoint._torch_load_with_validation = lambda path, **kwargs: read_pickle(validated(path))
    for name in ("_read", "read_metadata", "set_up_storage_reader", "read_data", "_check"):
        setattr(FileSystemReaderWithValidation, name, getattr(GuardedReader, name))
    DefaultLoadPlanner.load_bytes = GuardedPlanner.load_bytes  # type: ignore[method-assign, assignment]


def is_harmless(path: str | Path, specs: Iterable[tuple[int, int]] | None = None) -> bool:
    """Whether a checkpoint's file can be read by the gate, so that nothing in it could run.

    It is a single-file checkpoint, or `.metadata` or a `.distcp` file of a sharded one; `specs` are offset and length
    in bytes of the `.distcp` entries that will be read.

    Raises:
        ValueError: Says what it holds that it mustn't.
    """
    path = Path(path)
    if path.name == METADATA:
        read_metadata_file(path.parent)
    elif specs is None:
        read_pickle(path)
    else:
        with path.open("rb") as file:
            for offset, length in specs:
                file.seek(offset)
                try:
                    read_torch_buffer(bytearray(file.read(length)), values=True)
                except TorchFileError as error:
                    raise _refused(path, error) from None
    return True


def read_pickle(path: str | Path) -> Any:
    """Read a single-file checkpoint; tensors are mapped, not copied.

    Raises:
        ValueError: It isn't one, is damaged, or holds other things than tensors and plain values.
    """
    try:
        return read_torch_file(path, values=True)
    except TorchFileError as error:
        raise _refused(path, error) from None


def _refused(path: str | Path, error: TorchFileError) -> ValueError:
    fix = error.fix or "take another checkpoint, or write its weights as safetensors where it came from"
    return ValueError(
        f"checkpoint '{path}': must hold tensors and plain values and nothing else, whole; found {error}; {fix}"
    )
