"""Schedules for tests: every maker by name, plans of random size and cost."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from megagnn.pipeline_parallel.actions import Schedule
from megagnn.pipeline_parallel.conservative import conservative, two_pass
from megagnn.pipeline_parallel.schedules import gpipe, interleaved, one_f_one_b, zb_h1
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, ORDINARY, Costs

MAKERS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zb_h1,
    "interleaved": lambda p, m: interleaved(p, -(-m // p) * p, 3),
    "two-pass": two_pass,
    "conservative": conservative,
    "conservative-zb": lambda p, m: conservative(p, m, split=True),
}


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule of up to 6 ranks and 14 micro-batches."""
    make = MAKERS[draw(st.sampled_from(sorted(MAKERS)))]
    return make(draw(st.integers(1, 6)), draw(st.integers(1, 14)))


def random_costs(draw: st.DrawFn, schedule: Schedule) -> Costs:
    """Costs of uneven stages, micro-batches and messages."""
    size = st.floats(0.1, 4)
    return Costs(
        CONSERVATIVE if schedule.conservative else ORDINARY,
        stage=draw(st.lists(size, min_size=schedule.num_stages, max_size=schedule.num_stages)),
        micro_batch=draw(
            st.lists(size, min_size=schedule.num_micro_batches, max_size=schedule.num_micro_batches)
        ),
        latency=draw(st.floats(0, 2)),
        per_size=draw(st.floats(0, 2)),
    )
