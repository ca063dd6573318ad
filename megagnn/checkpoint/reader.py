"""Reading of checkpoints: a rank's boxes are filled from whatever boxes the files hold.

[Note: storage] The format is our own and not that of `torch.distributed.checkpoint`. Its default form keeps
metadata as a pickle. Its safetensors form names a tensor in a file by the tensor's name alone, so that a file
holds one box of each, where the run of a tensor that a sharded optimizer keeps makes three and more; it reads
the headers of all files to learn what is where, and has no checksums. Who writes what follows from the layout
(`boxes.share_of`), so no collective runs beside those of training.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagnn.checkpoint.boxes import Parts, whole_parts
from megagnn.checkpoint.manifest import Manifest

Slices = tuple[slice, ...]


def load_whole(folder: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, Tensor]:
    """{name: whole tensor} of tensors of a checkpoint, on the CPU."""
    entries = {name: manifest.tensors[name] for name in names}
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
    load_parts(folder, manifest, whole_parts(tensors))
    return tensors


@torch.no_grad()
def load_parts(folder: Path, manifest: Manifest, parts: Parts) -> None:
    """Fill the parts of {tensor: parts}; of each file no more is read than they need.

    Raises:
        ValueError: a tensor that the checkpoint does not have, not in this shape, or not all of; or a file
            that cannot be read.
    """
    missing = sorted(parts.keys() - manifest.tensors.keys())
    if missing:
        raise ValueError(f"checkpoint {folder} does not fit the model: missing {missing[:3]}")
    for name, held in parts.items():
        shape = manifest.tensors[name].shape
        if shape != held[0].full_shape:
            raise ValueError(
                f"checkpoint {folder} does not fit the model: {name} is {shape}, the model has "
                f"{held[0].full_shape}"
            )
    for file, copies in _copies(folder, manifest, parts).items():
        try:
            with safe_open(folder / file, "pt") as opened:
                for key, at, target in copies:
                    # a view of the file, which is mapped into memory: what is not copied is not read
                    target.copy_(opened.get_tensor(key)[at])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} cannot be read ({error})") from None


def _copies(folder: Path, manifest: Manifest, parts: Parts) -> dict[str, list[tuple[str, Slices, Tensor]]]:
    """{file: [(key of a box in it, what of the box, the memory that it goes to)]}."""
    copies: dict[str, list[tuple[str, Slices, Tensor]]] = {}
    seen, found = set(), Counter[str]()
    for name, box, file, key in manifest.boxes():
        if name not in parts or (name, box.offsets) in seen:  # two ranks may have written the same box
            continue
        seen.add((name, box.offsets))
        for part in parts[name]:
            common = box.overlap(part.box)
            if common is not None:
                found[name] += common.numel
                target = part.values[common.slices_in(part.box)]
                copies.setdefault(file, []).append((key, common.slices_in(box), target))
    for name, held in parts.items():
        if found[name] != sum(part.box.numel for part in held):
            raise ValueError(f"checkpoint {folder} does not hold all of {name}")
    return copies
