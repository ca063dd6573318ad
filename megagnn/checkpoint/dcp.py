"""`torch.distributed.checkpoint` on safetensors files of boxes.

[Note: storage] The library's own safetensors storage (torch 2.13, `hf_storage.py`) names a tensor in a file
by the tensor's name alone, so that a file holds one box of each; the run of a tensor that a sharded optimizer
keeps makes three and more. Its metadata are read from the headers of all files, and it has no checksums. So
the language of planners and metadata is the library's (boxes are its chunks; its resharding finds what
overlaps), and these classes say where a box lies.

Each rank saves and loads by itself (`no_dist`): who writes what follows from the layout
(`boxes.share_of`), and no collective runs beside those of training.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megagnn.checkpoint.boxes import Box, Part
from megagnn.checkpoint.manifest import Manifest, write_tensors

# It is what we ask for, and said at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

Parts = dict[str, list[Part]]


class PartSavePlanner(SavePlanner):
    """Writes each part of {tensor: parts} as it is; knows of no other rank."""

    def set_up_planner(
        self, state_dict: Parts, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """See SavePlanner."""
        self.parts = state_dict
        self.values = {(n, p.box.offsets): p.values for n, parts in state_dict.items() for p in parts}

    def create_local_plan(self) -> SavePlan:
        """See SavePlanner."""
        return SavePlan([_write_item(name, part) for name, parts in self.parts.items() for part in parts])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """See SavePlanner; there is one plan."""
        chunks = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=parts[0].values.dtype),
                torch.Size(parts[0].full_shape),
                [_chunk(part.box) for part in parts],
            )
            for name, parts in self.parts.items()
        }
        return all_plans, Metadata(dict(chunks))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """See SavePlanner."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """See SavePlanner."""
        return self.values[write_item.index.fqn, tuple(write_item.index.offset or ())]


class PartLoadPlanner(LoadPlanner):
    """Fills each part of {tensor: parts}, whatever boxes the checkpoint was written in.

    Raises:
        ValueError: a tensor that the checkpoint does not have, or not in this shape, or not all of.
    """

    def __init__(self, where: Path) -> None:
        self.where = where

    def set_up_planner(
        self, state_dict: Parts, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """See LoadPlanner."""
        assert metadata is not None
        self.parts, self.stored = state_dict, metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        """See LoadPlanner."""
        missing = sorted(self.parts.keys() - self.stored.keys())
        if missing:
            raise ValueError(f"checkpoint {self.where} does not fit the model: missing {missing[:3]}")
        items: list[ReadItem] = []
        for name, parts in self.parts.items():
            stored = self.stored[name]
            assert isinstance(stored, TensorStorageMetadata)
            if tuple(stored.size) != parts[0].full_shape:
                raise ValueError(
                    f"checkpoint {self.where} does not fit the model: {name} is {tuple(stored.size)}, the "
                    f"model has {parts[0].full_shape}"
                )
            found = create_read_items_for_chunk_list(name, stored, [_chunk(part.box) for part in parts])
            if sum(item.lengths.numel() for item in found) != sum(part.box.numel for part in parts):
                raise ValueError(f"checkpoint {self.where} does not hold all of {name}")
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """See LoadPlanner."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """See LoadPlanner."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """See LoadPlanner; a checkpoint holds tensors alone."""
        raise TypeError(f"{read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """See LoadPlanner."""
        index = read_item.dest_index
        assert index.index is not None
        values = self.parts[index.fqn][index.index].values
        return values[_slices(read_item.dest_offsets, read_item.lengths)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """See LoadPlanner; it is a view of where it belongs."""


class FileWriter(StorageWriter):
    """Writes one safetensors file, and waits until it is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See StorageWriter."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See StorageWriter."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See StorageWriter."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See StorageWriter."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See StorageWriter."""
        tensors, results = {}, []
        for item in plan.items:
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            key = Box(tuple(chunk.offsets), tuple(chunk.sizes)).key(item.index.fqn)
            values = planner.resolve_data(item)
            assert isinstance(values, Tensor)
            tensors[key] = values.detach().cpu().contiguous()
            results.append(WriteResult(item.index, values.nbytes, key))
        write_tensors(self.path, tensors)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See StorageWriter; the manifest of all ranks is the store's."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """See StorageWriter."""
        return False


class FolderReader(StorageReader):
    """Reads boxes from the files of a folder, of each file no more than what is asked for.

    It serves any planner, so that `dcp.load` fills plain tensors and DTensors from our checkpoints, too.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.places: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See StorageReader."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See StorageReader."""
        tensors = {
            name: TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(entry.shape), [])
            for name, entry in self.manifest.tensors.items()
        }
        for name, box, file, key in self.manifest.boxes():
            index = MetadataIndex(name, box.offsets)
            if index not in self.places:  # what two pipeline stages hold is there twice
                tensors[name].chunks.append(_chunk(box))
                self.places[index] = (file, key)
        return Metadata(dict(tensors))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """See StorageReader."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See StorageReader."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See StorageReader."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See StorageReader."""
        per_file: dict[str, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            file, key = self.places[item.storage_index]
            per_file.setdefault(file, []).append((key, item))
        for file, items in per_file.items():
            try:
                self._read_file(self.folder / file, items, planner)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / file} cannot be read ({error})") from None
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @staticmethod
    def _read_file(path: Path, items: list[tuple[str, ReadItem]], planner: LoadPlanner) -> None:
        with safe_open(path, "pt") as opened:
            for key, item in items:
                # a view of the file, which is mapped into memory: what is not copied is not read
                values = opened.get_tensor(key)[_slices(item.storage_offsets, item.lengths)]
                target = planner.resolve_tensor(item).detach()
                target.copy_(values)
                planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """See StorageReader."""
        return False


def save_parts(path: Path, parts: Parts) -> None:
    """Write a rank's parts to a file."""
    with _plain_errors():
        dcp.save(parts, storage_writer=FileWriter(path), planner=PartSavePlanner(), no_dist=True)


def load_parts(folder: Path, manifest: Manifest, parts: Parts) -> None:
    """Fill parts from a checkpoint; raises as `PartLoadPlanner`."""
    planner = PartLoadPlanner(folder)
    with _plain_errors(), torch.no_grad():
        dcp.load(dict(parts), storage_reader=FolderReader(folder, manifest), planner=planner, no_dist=True)


def load_whole(folder: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, Tensor]:
    """{name: whole tensor} of tensors of a checkpoint, on the CPU."""
    entries = {name: manifest.tensors[name] for name in names}
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
    load_parts(folder, manifest, whole_parts(tensors))
    return tensors


def whole_parts(tensors: Mapping[str, Tensor]) -> Parts:
    """Whole tensors as parts."""
    return {
        name: [Part(Box((0,) * tensor.ndim, tuple(tensor.shape)), tensor, tuple(tensor.shape))]
        for name, tensor in tensors.items()
    }


def _write_item(name: str, part: Part) -> WriteItem:
    chunk = _chunk(part.box)
    data = TensorWriteData(chunk, TensorProperties(dtype=part.values.dtype), torch.Size(part.full_shape))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def _slices(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(offsets, lengths, strict=True))


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """The library wraps errors of all ranks into one; here there is one rank."""
    try:
        yield
    except dcp.CheckpointException as wrapped:
        raise next(iter(wrapped.failures.values()))[0] from None
