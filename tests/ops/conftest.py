"""What several tests of the operations use."""

from collections.abc import Iterator

import pytest

from megagnn.ops import extension

LEVELS = extension.module.simd_levels() if extension.module else ["reference"]


@pytest.fixture(params=LEVELS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each SIMD level this processor has, in turn."""
    if extension.module is None:
        yield request.param
        return
    before = extension.module.simd_level()
    extension.module.set_simd_level(request.param)
    yield request.param
    extension.module.set_simd_level(before)
