"""A sharded checkpoint, read by torch.distributed.checkpoint without unpickling any of it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, LoadPlanner, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from composer_path.checkpoints.metadata_file import METADATA, read_metadata_file
from composer_path.weights.torch_file import TorchFileError, read_torch_buffer


class GuardedReader(FileSystemReader):
    """Reads `.metadata` by `read_metadata_file`, and the entries of its files as files of tensors and plain values.

    Use it by `load_sharded`, or call `read_metadata` first: torch hides what that raises.
    """

    _read: tuple[Any, Metadata] | None = None  # of which folder, since a load asks for it again

    def read_metadata(self) -> Metadata:  # type: ignore[override]  # of all ranks' files only the common one is written
        """The metadata, checked against the files.

        Raises:
            ValueError: See `read_metadata_file`.
        """
        if self._read is None or self._read[0] != self.path:
            self._read = self.path, read_metadata_file(self.path)
        return self._read[1]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:  # type: ignore[override]
        """Keep where the entries lie and what each is."""
        self.storage_data, self.entries = metadata.storage_data, metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the entries of a plan, each into the planner's tensor or value.

        Raises:
            ValueError: An entry is damaged, or holds other things than the metadata say.
        """
        for item in plan.items:
            index = item.storage_index
            info = self.storage_data[index]
            with Path(self.path, info.relative_path).open("rb") as file:
                file.seek(info.offset)
                data = bytearray(file.read(info.length))
            entry = f"checkpoint '{self.path}': entry '{index.fqn[:200]}' in {info.relative_path}"
            try:
                if item.type is LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(data))
                    continue
                tensor = read_torch_buffer(data)
                self._check(tensor, index)
            except TorchFileError as error:
                raise ValueError(
                    f"{entry}: must be tensors and plain values, whole, as {METADATA} says; found {error}; take "
                    "another checkpoint"
                ) from None
            target = planner.resolve_tensor(item).detach()
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dimension, start, length)
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check(self, tensor: Any, index: MetadataIndex) -> None:
        """An entry is the chunk of a tensor that the metadata say."""
        wanted: Any = self.entries[index.fqn]
        if type(tensor) is not Tensor or tensor.dtype != wanted.properties.dtype:
            raise TorchFileError(f"no tensor of {wanted.properties.dtype}")
        sizes = [chunk.sizes for chunk in wanted.chunks if chunk.offsets == index.offset]
        if tensor.shape not in sizes:
            raise TorchFileError(f"a tensor of {list(tensor.shape)}")


class GuardedPlanner(DefaultLoadPlanner):
    """Reads values that aren't tensors (times, numbers, random states) without unpickling them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value where the state dict wants it."""
        read = read_torch_buffer(bytearray(value.getbuffer()), values=True)
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            _put(self.original_state_dict, self.mappings[name], read)
        else:
            self.state_dict[name] = read


def load_sharded(content: dict[str, Any], reader: GuardedReader, *, partial: bool = False, alone: bool = False) -> None:
    """Fill a state dict from a sharded checkpoint; all ranks call it.

    Args:
        content: The state dict; its tensors are written into, its values replaced.
        reader: Of the checkpoint.
        partial: Whether entries that the checkpoint lacks stay as they are.
        alone: Whether this process reads for itself, without the other ranks.

    Raises:
        ValueError: An entry is damaged or holds what it mustn't, or doesn't fit.
    """
    reader.read_metadata()
    planner = GuardedPlanner(allow_partial_load=partial)
    try:
        with warnings.catch_warnings():  # that this is one process, which is what no_dist says
            warnings.simplefilter("ignore", UserWarning)
            load(content, storage_reader=reader, planner=planner, no_dist=alone)
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        words = str(failure) or type(failure).__name__
        raise ValueError(
            words if words.startswith("checkpoint '") else f"checkpoint '{reader.path}': rank {rank}: {words}"
        ) from None


def _put(content: Any, way: tuple[Any, ...], value: Any) -> None:
    """Replace the value at the end of a way through dicts and lists, which the state dict itself gave."""
    *holders, last = way
    for step in holders:
        content = content[step]
    content[last] = value
