"""Process groups of the grid of ranks."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # first met later, it would keep the world for ever: [Note: groups that end]

from megagnn.parallel.context import ParallelContext, grid_coordinates


def grid_context(dp: int, pp: int, tp: int, device: torch.device | None = None) -> ParallelContext:
    """This process's context, when the default process group of dp x pp x tp ranks exists.

    Every rank makes every group, in the same order, as PyTorch demands.
    """
    rank, grid = dist.get_rank(), torch.arange(dp * pp * tp).view(dp, pp, tp)
    along = {"dp": grid.permute(1, 2, 0), "pp": grid.permute(0, 2, 1), "tp": grid}
    groups: dict[str, Any] = {"world": dist.group.WORLD}
    for axis, lines in along.items():
        for line in lines.reshape(-1, lines.shape[-1]).tolist():
            if len(line) == 1:
                continue
            group = dist.group.WORLD if len(line) == dist.get_world_size() else dist.new_group(line)
            if rank in line:
                groups[axis] = group
    dp_rank, pp_rank, tp_rank = grid_coordinates(rank, dp, pp, tp)
    return ParallelContext(
        dp_size=dp,
        dp_rank=dp_rank,
        pp_size=pp,
        pp_rank=pp_rank,
        tp_size=tp,
        tp_rank=tp_rank,
        device=device or torch.device("cpu"),
        groups={axis: weakref.ref(group) for axis, group in groups.items()},
    )
