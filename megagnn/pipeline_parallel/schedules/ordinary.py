"""Schedules of an ordinary step: GPipe, 1F1B, interleaved 1F1B, ZB-H1.

Bubble share of p ranks and m micro-batches of equal cost (tests compare the simulator with these):

    GPipe, 1F1B           (p-1) / (m + p-1)                     Huang et al. 2019; Narayanan et al. 2019
    interleaved, v chunks (p-1) / (v m + p-1)                   Narayanan et al. 2021, Megatron-LM
    ZB-H1                 (p-1)(F+I-W) / (m (F+I+W) + (p-1)(F+I-W)),  m >= p;  Qi et al. 2023
"""

from collections.abc import Sequence

from megagnn.pipeline_parallel.actions import Action, Kind, Schedule
from megagnn.pipeline_parallel.registry import find, register

Rows = list[list[Action]]


def check_sizes(num_ranks: int, num_micro_batches: int, chunks: int = 1) -> None:
    """Refuse sizes below one.

    Raises:
        ValueError: naming the size.
    """
    for name, size in (("ranks", num_ranks), ("micro-batches", num_micro_batches), ("chunks", chunks)):
        if size < 1:
            raise ValueError(f"a schedule needs at least 1 of its {name}, got {size}")


def as_schedule(name: str, rows: Rows, num_micro_batches: int, placement: Sequence[int]) -> Schedule:
    """The schedule of these rows, one a rank."""
    return Schedule(name, tuple(placement), num_micro_batches, tuple(map(tuple, rows)))


@register("gpipe")
def gpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """All forwards, then all backwards, last micro-batch first; keeps every micro-batch."""
    check_sizes(num_ranks, num_micro_batches)
    count = range(num_micro_batches)
    rows = [
        [Action(r, "F", i) for i in count] + [Action(r, "B", i) for i in reversed(count)]
        for r in range(num_ranks)
    ]
    return as_schedule("gpipe", rows, num_micro_batches, range(num_ranks))


def alternate(
    rank: int, num_ranks: int, num_micro_batches: int, forward: Kind, backward: Kind
) -> list[Action]:
    """A rank's 1F1B: p-1-r forwards ahead, then one forward, one backward, then the backwards left."""
    ahead = min(num_ranks - 1 - rank, num_micro_batches)
    row = [Action(rank, forward, i) for i in range(ahead)]
    for i in range(num_micro_batches):
        if i + ahead < num_micro_batches:
            row.append(Action(rank, forward, i + ahead))
        row.append(Action(rank, backward, i))
    return row


@register("1f1b")
def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Schedule:
    """One forward, one backward (PipeDream-flush); rank r keeps at most p-r micro-batches."""
    check_sizes(num_ranks, num_micro_batches)
    rows = [alternate(r, num_ranks, num_micro_batches, "F", "B") for r in range(num_ranks)]
    return as_schedule("1f1b", rows, num_micro_batches, range(num_ranks))


def whole_rounds(num_ranks: int, num_micro_batches: int) -> int:
    """The next multiple of the ranks."""
    return num_micro_batches + -num_micro_batches % num_ranks


@register("interleaved", stages_per_rank=2, fewest=whole_rounds)
def interleaved(num_ranks: int, num_micro_batches: int, chunks: int = 2) -> Schedule:
    """1F1B with `chunks` stages a rank, stage k on rank k mod p (Megatron-LM).

    The bubble is divided by the number of chunks. Micro-batches come in rounds of p, which pass chunk after
    chunk; rank r runs 2(p-1-r) + (chunks-1)p forwards ahead and keeps one chunk's activations more than that.

    Raises:
        ValueError: micro-batches that are no multiple of the ranks.
    """
    check_sizes(num_ranks, num_micro_batches, chunks)
    find("interleaved").check(num_ranks, num_micro_batches)
    order = [
        (chunk, start + i)
        for start in range(0, num_micro_batches, num_ranks)
        for chunk in range(chunks)
        for i in range(num_ranks)
    ]
    rows: Rows = []
    for rank in range(num_ranks):
        forwards = [Action(chunk * num_ranks + rank, "F", i) for chunk, i in order]
        backwards = [Action((chunks - 1 - chunk) * num_ranks + rank, "B", i) for chunk, i in order]
        # With one chunk this is plain 1F1B, which needs to run half as far ahead.
        ahead = 2 * (num_ranks - 1 - rank) + (chunks - 1) * num_ranks if chunks > 1 else num_ranks - 1 - rank
        ahead = min(ahead, len(forwards))
        row = forwards[:ahead]
        for k, backward in enumerate(backwards):
            row += [*forwards[ahead + k : ahead + k + 1], backward]
        rows.append(row)
    return as_schedule(
        "interleaved", rows, num_micro_batches, [k % num_ranks for k in range(num_ranks * chunks)]
    )


@register("zb-h1")
def zb_h1(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Zero-bubble H1: 1F1B whose backward is split, weight parts r micro-batches late on rank r.

    Late weight parts fill what 1F1B waits at the end; every rank keeps at most p micro-batches, as rank 0
    of 1F1B does.
    """
    check_sizes(num_ranks, num_micro_batches)
    rows: Rows = []
    for rank in range(num_ranks):
        row: list[Action] = []
        weights = 0
        for action in alternate(rank, num_ranks, num_micro_batches, "F", "I"):
            row.append(action)
            if action.kind == "I" and action.micro_batch - weights >= rank:
                row.append(Action(rank, "W", weights))
                weights += 1
        row += [Action(rank, "W", i) for i in range(weights, num_micro_batches)]
        rows.append(row)
    return as_schedule("zb-h1", rows, num_micro_batches, range(num_ranks))
