"""Pack a store into one archive to ship: python tools/pack_store.py STORE ARCHIVE.tar.xz

The same store gives the same bytes. `megagnn prepare ARCHIVE.tar.xz --out DIR` unpacks and verifies it.
"""

import argparse
import io
import lzma
import sys
import tarfile
from pathlib import Path

from megagnn.data.formats.packed import ARCHIVE_SUFFIX, MEMBERS, OPTIONAL_MEMBERS
from megagnn.data.store import Store


def pack_store(directory: str | Path, archive: str | Path) -> None:
    """Write the archive of a store; the same store gives the same bytes (on one version of liblzma).

    Raises:
        ValueError: a directory that is no store or a damaged one, or a name that does not end in .tar.xz.
    """
    source, target = Path(directory), Path(archive)
    if not target.name.endswith(ARCHIVE_SUFFIX):
        raise ValueError(f"an archive of a store is named *{ARCHIVE_SUFFIX}, got {target}")
    store = Store.open(source)
    store.verify()
    names = (*MEMBERS, *(name for name in OPTIONAL_MEMBERS if name in store.header.sha256))
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            data = (source / name).read_bytes()
            member = tarfile.TarInfo(name)  # no owner, time 0, mode 0644
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    partial = target.with_name(f".{target.name}.part")
    try:
        partial.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def main() -> int:
    """Pack; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Pack a store into one .tar.xz archive, the same bytes every time."
    )
    parser.add_argument("store", type=Path, help="directory of the store")
    parser.add_argument("archive", type=Path, help="file to be written, *.tar.xz")
    args = parser.parse_args()
    try:
        pack_store(args.store, args.archive)
    except ValueError as error:
        print(f"pack_store: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.archive}: {args.archive.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
