"""Frames with predictions: what becomes of the labels that were there, and files of any format ASE writes."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ase
import ase.db
import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.formats import UnknownFileTypeError, filetype, get_ioformat
from ase.outputs import all_outputs
from ase.stress import voigt_6_to_full_3x3_stress

from megagnn.train.predictor import Results

LABEL_PREFIX = "REF_"
"""Before the names of labels that a frame had under the names of predictions."""
ATOMIC_ENERGIES = "atomic_energies"
PREDICTED = ("energy", "forces", "stress", "energies", "free_energy", ATOMIC_ENERGIES)
STREAMED = ("extxyz", "traj")  # formats that take frames one by one, so that no more than a batch is held
DATABASES = ("db", "json")  # which have `key_value_pairs` and `data` of each frame instead of `info`


def with_predictions(
    atoms: ase.Atoms, results: Results, format: str = "extxyz", number: int | None = None
) -> ase.Atoms:
    """A copy of a frame that has the predictions as its results, and its own labels beside them.

    Labels under the names of results, in the frame's calculator or among its `info` and arrays, get the
    prefix REF_, as REF_energy and REF_forces; where it has such a key already, that one stays and the other
    label is left out. All else stays as it is, labels under names of their own included.

    Args:
        results: see `Predictor.results`.
        format: of the file it is for. Atomic energies are the array `atomic_energies` in extended XYZ and the
            result `energies` in other formats; databases hold both, and labels, in their `data`.
        number: kept as `input_frame`.
    """
    frame = atoms.copy()
    if number is not None:
        frame.info["input_frame"] = number
    _keep_labels(frame, atoms.calc.results if atoms.calc is not None else {}, format)
    results = dict(results)
    if format in ("extxyz", *DATABASES):
        frame.new_array(ATOMIC_ENERGIES, results.pop("energies"))
    if format in DATABASES:
        _info_to_database(frame)
    frame.calc = SinglePointCalculator(frame, **results)
    return frame


def _keep_labels(frame: ase.Atoms, results: dict[str, Any], format: str) -> None:
    labels = {name: frame.info.pop(name) for name in PREDICTED if name in frame.info}
    labels |= {name: frame.arrays.pop(name) for name in PREDICTED if name in frame.arrays}
    labels |= {name: value for name, value in results.items() if value is not None}
    taken = {*frame.info, *frame.arrays}
    for name, value in labels.items():
        if LABEL_PREFIX + name in taken:
            continue
        if name == "stress" and np.shape(value) == (6,):
            value = voigt_6_to_full_3x3_stress(value).reshape(9)
        # other formats than extended XYZ have no place for arrays of other names than ASE's
        place = frame.arrays if format == "extxyz" and _is_per_atom(name) else frame.info
        place[LABEL_PREFIX + name] = value


def _is_per_atom(name: str) -> bool:
    return name == ATOMIC_ENERGIES or (name in all_outputs and "natoms" in all_outputs[name].shapespec)


def _info_to_database(frame: ase.Atoms) -> None:
    if "input_frame" in frame.info:
        pairs = frame.info.get("key_value_pairs", {})
        frame.info["key_value_pairs"] = {**pairs, "input_frame": frame.info["input_frame"]}
    data = dict(frame.info.get("data", {}))
    for place in (frame.info, frame.arrays):
        for name in [name for name in place if name.startswith((LABEL_PREFIX, ATOMIC_ENERGIES))]:
            data.setdefault(name, place.pop(name))
    frame.info["data"] = data


def output_format(out: Path, name: str | None) -> str:
    """ASE's name of the format of a file to be written: the one given, or by the file's ending.

    Raises:
        ValueError: an unknown ending, or a format that ASE does not write.
    """
    try:
        name = name or filetype(str(out), read=False)
        known = get_ioformat(name)
    except UnknownFileTypeError:
        raise ValueError(
            f"ASE knows no format of {out}{f' by the name {name!r}' if name else ''}; use an ending such as "
            ".extxyz, or --out-format extxyz"
        ) from None
    if not known.can_write:
        raise ValueError(f"ASE does not write the format '{name}' of {out}; use .extxyz, .traj, .db or .json")
    return name


def check_format(out: Path, format: str, has_forces: bool, has_stress: bool) -> list[str]:
    """Names of a model's energy, forces, stress and atomic energies that files of a format do not keep.

    They are found by writing one such frame and reading it.

    Raises:
        ValueError: neither energies nor forces are kept, or ASE cannot write such a file.
    """
    if format in DATABASES:
        return []
    results: Results = {"energy": -1.5, "energies": np.array([-1.0, -0.5])}
    if has_stress:
        results["stress"] = np.full(6, 0.25)
    if has_forces:
        results["forces"] = np.full((2, 3), 0.5)
    probe = ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]], cell=[5, 5, 5], pbc=True)
    probe = with_predictions(probe, results, format)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / out.name
        try:
            ase.io.write(str(file), [probe], format=format)
        except Exception as error:
            raise ValueError(
                f"ASE cannot write {out} as '{format}': {_reason(error)}; use .extxyz, .traj, .db or .json"
            ) from error
        if file.is_dir():
            raise ValueError(f"the format '{format}' of {out} is a folder; use .extxyz, .traj, .db or .json")
        try:
            read: Any = ase.io.read(str(file), index=-1, format=format, do_not_split_by_at_sign=True)
        except Exception:  # a format that ASE only writes, such as pictures
            read = ase.Atoms()
    kept = dict(read.calc.results) if read.calc is not None else {}
    if ATOMIC_ENERGIES in read.arrays:
        kept["energies"] = True
    lost = [name for name in results if name not in kept]
    if "energy" in lost and ("forces" in lost or not has_forces):
        raise ValueError(
            f"files of the format '{format}' hold no energies and no forces, so {out} would not hold the "
            "predictions; use .extxyz, .traj, .db or .json"
        )
    return ["atomic energies" if name == "energies" else name for name in lost]


def write_frames(out: Path, frames: Iterable[ase.Atoms], format: str) -> None:
    """Write frames beside `out` and move the file into place when it is whole; on an error nothing remains.

    Extended XYZ, ASE's trajectories and databases are written as the frames come, other formats at the end.

    Raises:
        ValueError: several frames for a format of one, or what ASE cannot write.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # the ending stays, for ASE compresses by it and knows databases by it
    temporary = out.with_name(f".{os.getpid()}.tmp.{out.name}")
    try:
        try:
            if format in DATABASES:
                _write_database(temporary, frames)
            else:
                images: Any = frames if format in STREAMED else _all_of(frames, out, format)
                ase.io.write(str(temporary), images, format=format)
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise ValueError(f"ASE cannot write {out} as '{format}': {_reason(error)}") from error
        os.replace(temporary, out)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _write_database(file: Path, frames: Iterable[ase.Atoms]) -> None:
    with ase.db.connect(file, serial=True, append=False) as database:
        for frame in frames:
            pairs, data = (frame.info.get(name, {}) for name in ("key_value_pairs", "data"))
            database.write(frame, key_value_pairs=pairs, data=data)


def _all_of(frames: Iterable[ase.Atoms], out: Path, format: str) -> list[ase.Atoms]:
    single = get_ioformat(format).single
    images: list[ase.Atoms] = []
    for frame in frames:
        if single and images:
            raise ValueError(
                f"files of the format '{format}' hold one frame, and there are more for {out}; use .extxyz, "
                ".traj, .db or .json"
            )
        images.append(frame)
    return images


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
