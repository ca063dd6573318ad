"""The C library's allocator, tuned for large tensors that come and go.

[Note: page faults] glibc takes blocks above 32 MiB straight from the kernel (mmap) and gives them back when
freed, and trims the top of its heap. Each fresh page then costs a fault and a clearing, which together take
far longer than writing to memory in use. Training frees and takes the same sizes at every step, so the
memory is kept: no mmap, no trimming, growth in large pieces. The process holds its peak until it ends.
"""

import ctypes
import platform
import sys

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP_BYTES = 2**31 - 1  # mallopt takes an int: 2 GiB of free memory at the top are never trimmed
_GROW_BYTES = 64 * 2**20


def configure_allocator() -> bool:
    """Makes glibc keep freed memory for the next step; see [Note: page faults]. Call before large tensors.

    Returns whether it did; False, with nothing done, where the C library is not glibc (macOS, musl, Windows),
    or where another allocator has replaced it and refuses.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, _GROW_BYTES))
    return all(mallopt(option, value) == 1 for option, value in settings)
