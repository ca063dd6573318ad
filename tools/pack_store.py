"""Pack a store into one archive to ship: python tools/pack_store.py STORE ARCHIVE.tar.xz

The same store gives the same bytes. `megagnn prepare ARCHIVE.tar.xz --out DIR` unpacks and verifies it.
"""

import argparse
import sys
from pathlib import Path

from megagnn.data.formats.packed import pack_store


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
