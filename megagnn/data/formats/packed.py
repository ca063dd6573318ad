"""Stores as input, and their archives: one .tar.xz file to ship a store in."""

import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megagnn.data import keys
from megagnn.data.formats.assemble import usable_stress
from megagnn.data.formats.groups import group_name
from megagnn.data.formats.options import ReadOptions
from megagnn.data.record import Structure
from megagnn.data.store import Store
from megagnn.data.store_format import ARRAYS, GROUPS_FILE, HEADER_FILE, OPTIONAL_ARRAYS, StoreHeader
from megagnn.data.store_writer import new_store

ARCHIVE_SUFFIX = ".tar.xz"
MEMBERS = (HEADER_FILE, *(f"{name}.npy" for name in sorted(ARRAYS)))
"""The files of an archive, in order, all at its top level; then OPTIONAL_MEMBERS where the store has them."""
OPTIONAL_MEMBERS = (GROUPS_FILE, *(f"{name}.npy" for name in sorted(OPTIONAL_ARRAYS)))


def is_store(path: Path) -> bool:
    """Whether a path is a store or (by its name) an archive of one."""
    return path.name.endswith(ARCHIVE_SUFFIX) or (path / HEADER_FILE).is_file()


def read_store(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Yield the structures of a store or its archive with their own sources, levels, groups and splits.

    Options of source and level replace the store's own where given.

    Raises:
        ValueError: keys of labels, which a store does not have; see `Store.open`, `Store.verify`,
            `unpack_store`.
    """
    given = [f"--{name}-key" for name, key in options.all_keys.items() if key is not None]
    if given:
        raise ValueError(
            f"{path} is a store, whose labels have no names of their own; leave {', '.join(given)} out"
        )
    if path.is_dir():
        yield from _read_open_store(Store.open(path), path, options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "store"
        unpack_store(path, directory)
        yield from _read_open_store(Store.open(directory), path, options)


def store_header(path: Path) -> StoreHeader:
    """Header of a store or its archive.

    Raises:
        ValueError: see `StoreHeader.read`, `unpack_store`.
    """
    if path.is_dir():
        return StoreHeader.read(path)
    with tempfile.TemporaryDirectory() as scratch:
        _extract(path, Path(scratch))
        return StoreHeader.read(Path(scratch))


def unpack_store(archive: str | Path, directory: str | Path, overwrite: bool = False) -> Store:
    """Unpack an archive into a new store and verify its checksums; on any error nothing remains.

    Only the regular files of a store at the archive's top level are accepted, so an archive can write nowhere
    else.

    Raises:
        ValueError: an archive that is unreadable, truncated, holds anything else or fails its checksums, or a
            directory that exists.
    """
    source, target = Path(archive), Path(directory)
    if not source.is_file():
        raise ValueError(f"{source} is not a file; give an archive made by tools/pack_store.py")
    with new_store(target, overwrite) as work:
        _extract(source, work)
        Store.open(work).verify()
    return Store.open(target)


def _extract(source: Path, work: Path) -> None:
    try:
        with tarfile.open(source, mode="r:xz") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isfile() or name not in (*MEMBERS, *OPTIONAL_MEMBERS) or (work / name).exists():
                    raise ValueError(
                        f"{source} holds {member.name!r}, which is not a plain file of a store; refused to "
                        "unpack it"
                    )
                content = tar.extractfile(member)
                assert content is not None  # a regular file always has content
                with (work / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise ValueError(f"cannot unpack {source}: {error}; is the file whole?") from error


def _read_open_store(store: Store, path: Path, options: ReadOptions) -> Iterator[Structure]:
    names, config_types, files = store.group_names(), store.config_types(), store.files()
    own = f"store {store.header.sha256.get('positions.npy', '')[:12]} group"
    for index in range(len(store)):
        s = store.structure(index)
        source, level = store.header.sources[s[keys.SOURCE]], store.header.levels[s[keys.LEVEL]]
        # Without stored names a group is known by its number, which means nothing outside this store.
        group = f"{own} {store.group[index]}" if names is None else names[store.group[index]]
        stress = s[keys.STRESS].astype(np.float64) if keys.STRESS in s else None
        stress, notes = usable_stress(stress, s[keys.PBC])
        yield Structure(
            atomic_numbers=np.array(s[keys.ATOMIC_NUMBERS]),
            positions=s[keys.POSITIONS].astype(np.float64),
            cell=s[keys.CELL].astype(np.float64),
            pbc=np.array(s[keys.PBC]),
            energy=s.get(keys.ENERGY),
            forces=s[keys.FORCES].astype(np.float64) if keys.FORCES in s else None,
            stress=stress,
            group=group_name(
                options.group_by,
                path=path,
                frame=index,
                numbers=s[keys.ATOMIC_NUMBERS],
                positions=s[keys.POSITIONS],
                cell=s[keys.CELL],
                info={},
                file_content=options.file_content,
                auto=group,
            ),
            source=options.source or source,
            level=options.level or level,
            fixed=np.array(s[keys.FIXED]) if s[keys.FIXED].any() else None,
            split=int(store.split[index]),
            notes=notes,
            weights=tuple(map(float, s.get(keys.WEIGHTS, (1, 1, 1)))),  # type: ignore[arg-type]
            config_type=str(config_types[index]),
            charge=s.get(keys.CHARGE, 0.0),
            multiplicity=s.get(keys.MULTIPLICITY, 0),
            file=str(files[index]),
            others={name: np.asarray(s[name], np.float64) for name in keys.OTHER_LABELS if name in s},
        )
