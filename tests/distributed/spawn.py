"""Ranks for tests, in which a collective that autograd does not see is an error."""

import warnings
from collections.abc import Callable
from typing import Any

from megagnn.parallel import spawn as package
from megagnn.parallel.context import ParallelContext

# It gives silently wrong second derivatives; PyTorch warns of it.
UNSEEN_BY_AUTOGRAD = ".*autograd kernel was not registered.*"


def spawn(
    world_size: int, function: Callable[..., Any], *arguments: Any, pp: int = 1, tp: int = 1
) -> list[Any]:
    """`megagnn.parallel.spawn.spawn`, strict."""
    return package.spawn(world_size, _strict, function, *arguments, pp=pp, tp=tp)


def _strict(context: ParallelContext, function: Callable[..., Any], *arguments: Any) -> Any:
    warnings.filterwarnings("error", message=UNSEEN_BY_AUTOGRAD)
    return function(context, *arguments)
