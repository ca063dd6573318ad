"""Steps that must not be taken: a loss or gradient norm that is not finite, or a norm far above the usual.

Every rank looks at what it has, and all ranks take one decision, from the sum of their votes: machines that
round differently must not part ways. The same message, of four numbers, carries the wish to stop
(`train.signals`).
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megagnn.checkpoint.progress import Progress
from megagnn.config import RunConfig
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import sum_over_ranks

WINDOW = 100  # steps of which the median is taken
ENOUGH = 20  # steps before which it says little


@dataclass(frozen=True)
class Judgement:
    """What all ranks decided about a step."""

    fault: str = ""
    """What is wrong with the step; empty for a good one."""
    stop: bool = False
    """Whether a signal asked any rank to stop."""


def judge(
    loss: Tensor,
    norm: Tensor,
    recent_norms: Sequence[float],
    spike_factor: float | None,
    wants_to_stop: bool,
    context: ParallelContext,
) -> Judgement:
    """The same on every rank.

    Args:
        loss: this rank's share, a scalar.
        norm: gradient norm of the whole model, a scalar.
        recent_norms: of the good steps before.
        spike_factor: a norm above so many times their median is a fault; None for no limit.
    """
    own, size = float(loss), float(norm)
    has_limit = spike_factor is not None and len(recent_norms) >= ENOUGH
    median = statistics.median(recent_norms) if has_limit else math.inf
    limit = (spike_factor or 1.0) * median
    votes = [wants_to_stop, not math.isfinite(own), not math.isfinite(size), size > limit]
    stop, bad_loss, bad_norm, spike = sum_over_ranks(votes, context)
    if bad_loss:
        num_bad = math.ceil(bad_loss / (context.pp_size * context.tp_size))
        fault = f"the loss is not finite on {num_bad} of {context.dp_size} data-parallel rank(s)"
    elif bad_norm:
        fault = f"the gradient norm is {size}"
    elif spike:
        fault = (
            f"the gradient norm {size:.4g} is above optim.spike_factor {spike_factor:g} x {median:.4g}, the "
            f"median of {len(recent_norms)} steps"
        )
    else:
        fault = ""
    return Judgement(fault, stop > 0)


def advance(progress: Progress, config: RunConfig, fault: str, norm: Tensor) -> Progress:
    """Where the run stands after a step that was taken, or after a bad one that was left out."""
    recent = progress.recent_norms
    if not fault and config.optim.spike_factor is not None:
        recent = [*recent, float(norm)][-WINDOW:]
    return dataclasses.replace(
        progress,
        step=progress.step + 1,
        step_in_epoch=progress.step_in_epoch + 1,
        recent_norms=recent,
        bad_in_a_row=progress.bad_in_a_row + 1 if fault else 0,
        skipped_steps=progress.skipped_steps + bool(fault),
    )
