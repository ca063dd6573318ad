"""The best layout of a model on a cluster: all grids of ranks, stages of ZeRO and ways to save memory.

Every layout takes the same batch: as many micro-batches in all as the configuration would have with all ranks
data-parallel. What a layout may not be, or does not fit, is kept with the reason.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from megagnn.config import RunConfig
from megagnn.overrides import explain
from megagnn.plan.cluster import Cluster
from megagnn.plan.layout import Layout, Sizes, make_layout
from megagnn.plan.memory import Moment, peak, worst_course
from megagnn.plan.times import Rates, Times, rates, times

MAX_PIPELINE = 32


@dataclass(frozen=True)
class Plan:
    """A layout on a cluster."""

    layout: Layout
    pp_rank: int
    """The pipeline rank that holds most."""
    moments: list[Moment]
    """Its memory over a step."""
    times: Times
    rates: Rates

    @property
    def peak(self) -> Moment:
        return peak(self.moments)


class Failure(NamedTuple):
    """A layout that cannot be."""

    grid: tuple[int, int, int]
    """dp, pp, tp."""
    settings: str
    reason: str
    shortage: float
    """Bytes beyond the limit; 0 where another rule forbids the layout."""


class Choice(NamedTuple):
    """A way to save memory, in words and as keys of the configuration."""

    words: str
    model: dict[str, Any]
    optim: dict[str, Any]


def make_plan(layout: Layout, cluster: Cluster) -> Plan:
    """The plan of a layout, whether it fits or not."""
    return _timed(layout, cluster, *worst_course(layout, cluster.device.kind == "cpu"))


def _timed(layout: Layout, cluster: Cluster, rank: int, moments: list[Moment]) -> Plan:
    found = times(layout, cluster)
    return Plan(layout, rank, moments, found, rates(layout, cluster, found))


def fault(layout: Layout, most: Moment, cluster: Cluster) -> tuple[str, float]:
    """(why a layout that holds so much at most does not fit the memory, the bytes that lack); empty where it
    does."""
    limit = cluster.memory_limit
    host = most.num_bytes.get("offloaded", 0.0)
    room = 1e9 * cluster.node.host_memory_gb
    if most.total > limit:
        largest = max(most.num_bytes, key=lambda name: most.num_bytes[name] * (name != "offloaded"))
        return (
            f"needs {most.total / 1e9:.3g} GB of {limit / 1e9:.3g} in the {most.name}, of which "
            f"{most.num_bytes[largest] / 1e9:.3g} are {largest}",
            most.total - limit,
        )
    if layout.config.optim.offload == "host" and host > room:
        return f"needs {host / 1e9:.3g} GB of {room / 1e9:.3g} on the host", host - room
    return "", 0.0


def search(
    config: RunConfig, sizes: Sizes, cluster: Cluster, num_ranks: int
) -> tuple[list[Plan], list[Failure]]:
    """(plans that fit, the one with the most atoms a second first; what fails and why).

    Of each grid and stage of ZeRO the first choice that fits is kept, the choices rising in what they cost.
    """
    plans: list[Plan] = []
    failures: list[Failure] = []
    batches = config.optim.accumulate_steps * num_ranks
    for dp, pp, tp in grids(num_ranks, config.model.num_layers, cluster.node.devices):
        for stage in (0, 1, 2, 3) if dp > 1 else (0, 3):
            found, failed = _first_that_fits(config, sizes, cluster, (dp, pp, tp), stage, batches // dp)
            plans += found
            failures += failed
    plans.sort(key=lambda plan: (-plan.rates.atoms_per_second, plan.peak.total))
    return plans, failures


def grids(num_ranks: int, num_layers: int, devices: int) -> Iterator[tuple[int, int, int]]:
    """(dp, pp, tp) of so many ranks: tensor-parallel ranks within a node, no more stages than layers."""
    for tp, pp in itertools.product(_divisors(num_ranks, devices), _divisors(num_ranks, MAX_PIPELINE)):
        if num_ranks % (tp * pp) == 0 and pp <= num_layers:
            yield num_ranks // (tp * pp), pp, tp


def _divisors(number: int, most: int) -> list[int]:
    return [k for k in range(1, min(number, most) + 1) if number % k == 0]


def choices(config: RunConfig, cluster: Cluster) -> Iterable[Choice]:
    """Ways to save memory, the cheapest first."""
    fields = {field.name for field in dataclasses.fields(config.model)}
    models: list[tuple[str, dict[str, Any]]] = [("", {"recompute_layers": False})]
    if "edge_memory" in fields:
        models[0][1]["edge_memory"] = "save"
        models.append(("blocks again", {"edge_memory": "recompute", "recompute_layers": False}))
        models.append(("blocks and layers again", {"edge_memory": "recompute", "recompute_layers": True}))
    else:
        models.append(("layers again", {"recompute_layers": True}))
    offloads = ["none", "host"] if cluster.device.kind == "gpu" else ["none"]
    for offload, (words, model) in itertools.product(offloads, models):
        away = [] if offload == "none" else [f"offload {offload}"]
        optim = {"offload": offload, "offload_dir": None}
        yield Choice(", ".join([*([words] if words else []), *away]) or "nothing again", model, optim)


def _first_that_fits(
    config: RunConfig,
    sizes: Sizes,
    cluster: Cluster,
    grid: tuple[int, int, int],
    stage: int,
    micro_batches: int,
) -> tuple[list[Plan], list[Failure]]:
    dp, pp, tp = grid
    failures: list[Failure] = []
    schedule = config.parallel.schedule if pp > 1 else "auto"
    for choice in choices(config, cluster):
        settings = f"ZeRO {stage}, {choice.words}"
        changes: dict[str, Any] = {"data": dp, "pipeline": pp, "tensor": tp, "zero_stage": stage}
        changes |= {"schedule": schedule, "stages": None, "stage_costs": "modelled"}
        try:
            candidate = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, **choice.model),
                optim=dataclasses.replace(config.optim, accumulate_steps=micro_batches, **choice.optim),
                parallel=dataclasses.replace(config.parallel, **changes),
            )
            layout = make_layout(candidate, sizes, dp * pp * tp)
            rank, moments = worst_course(layout, cluster.device.kind == "cpu")
        except ValueError as error:
            told = map(explain, error.errors()) if isinstance(error, ValidationError) else [str(error)]
            text = "; ".join(told).replace("\n", "; ")
            if all(failure.reason != text for failure in failures):
                failures.append(Failure(grid, settings, text, 0.0))
            continue
        reason, shortage = fault(layout, peak(moments), cluster)
        if not reason:
            return [_timed(layout, cluster, rank, moments)], failures
        failures.append(Failure(grid, settings, reason, shortage))
    return [], failures
