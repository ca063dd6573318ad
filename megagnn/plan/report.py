"""A plan in words and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from megagnn.plan.cluster import Cluster
from megagnn.plan.layout import Layout
from megagnn.plan.memory import CATEGORIES, ELSEWHERE
from megagnn.plan.search import Failure, Plan, fault
from megagnn.plan.times import link_bytes, step_units


def settings_of(layout: Layout) -> str:
    """ZeRO 3, blocks again, offload host, conservative."""
    config, words = layout.config, [f"ZeRO {layout.stage}"]
    blocks = getattr(layout.model, "edge_memory", "save") == "recompute"
    again = " and ".join(["blocks"] * blocks + ["layers"] * layout.model.recompute_layers)
    words += [f"{again} again"] * bool(again)
    words += [f"offload {config.optim.offload}"] * (config.optim.offload != "none")
    words += [f"plan {layout.edge_plan}"] * (layout.tp > 1)
    words += [f"schedule {config.schedule}"] * (layout.pp > 1)
    return ", ".join(words)


def to_text(plan: Plan, cluster: Cluster) -> str:
    """The plan of one layout."""
    layout, r, eff = plan.layout, plan.rates, cluster.efficiency
    sizes, precision = layout.sizes, layout.precision
    reason, _ = fault(layout, plan.peak, cluster)
    batches = layout.dp * layout.micro_batches
    lines = [
        f"{layout.model.family}, {layout.num_parameters:,} parameters, {layout.model.forces} forces, "
        f"{precision}",
        f"{layout.num_ranks:,} x {cluster.device.name} ({cluster.name}): data {layout.dp} x pipeline "
        f"{layout.pp} x tensor {layout.tp}, {settings_of(layout)}",
        f"a step of {batches:,} batches of {sizes.num_atoms:,} atoms and {sizes.num_edges:,} edges, "
        f"{layout.micro_batches} a rank",
        "",
        *memory_lines(plan),
        "",
        f"does not fit: {reason}" if reason else f"fits {cluster.memory_limit / 1e9:.4g} GB",
        "",
        *time_lines(plan, cluster),
        "",
        f"{r.atoms_per_second:,.4g} atoms/s, {r.structures_per_second:,.4g} structures/s, "
        f"{100 * r.of_peak:.3g} % of the peak of {str(precision.parameters).removeprefix('torch.')} products",
        f"energy {r.watt_hours:,.4g} Wh a step"
        + ("" if r.price is None else f", price {r.price:,.4g} a step"),
        f"limited by {limit_of(plan)}; rates are {100 * eff.products:.0f} % of the peak of products, "
        f"{100 * eff.memory:.0f} % of memory's and {100 * eff.links:.0f} % of links' (docs/planning.md)",
    ]
    return "\n".join(lines)


def memory_lines(plan: Plan) -> list[str]:
    """Rows of moments, columns of what the memory is for, in GB (MB below 2 GB)."""
    unit, name = (1e9, "GB") if plan.peak.total >= 2e9 else (1e6, "MB")
    columns = [c for c in (*CATEGORIES, ELSEWHERE) if any(m.num_bytes.get(c, 0) for m in plan.moments)]
    rows = [[f"memory, {name}", "all", *columns]]
    for moment in plan.moments:
        values = [moment.total, *(moment.num_bytes.get(column, 0.0) for column in columns)]
        rows.append([moment.name, *(f"{value / unit:,.2f}" for value in values)])
    return table(rows)


def time_lines(plan: Plan, cluster: Cluster) -> list[str]:
    """What a step takes, and what is computed and sent for it."""
    t, layout = plan.times, plan.layout
    parts = {
        "layers": t.compute,
        "tensor-parallel messages": t.tensor,
        "waiting for stages": t.bubble,
        "data-parallel messages": t.data,
        "update": t.update,
    }
    shares = [f"{name} {100 * value / t.step:.1f} %" for name, value in parts.items() if value]
    names, sent = {"node": "within nodes", "network": "between nodes"}, []
    for link, by_axis in link_bytes(layout, cluster, t.sent).items():
        sent += [f"{axis} {value / 1e9:,.4g} GB {names[link]}" for axis, value in by_axis.items()]
    return [
        f"step {seconds(t.step)}: {', '.join(shares)}",
        f"operations {t.flops:.4g} a step; {t.executed:.4g} on a rank, as {step_units(layout):g} forwards",
        f"a rank sends {', '.join(sent) or 'nothing'} a step",
    ]


def limit_of(plan: Plan) -> str:
    """What takes most of the step."""
    t = plan.times
    parts = {"products and memory": t.compute, "tensor-parallel messages": t.tensor}
    parts |= {"waiting for other stages": t.bubble, "data-parallel messages": t.data, "the update": t.update}
    return max(parts, key=lambda name: parts[name])


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def search_text(plans: Sequence[Plan], failures: Sequence[Failure], limit: int) -> str:
    """The best layouts, and of each grid without one why."""
    rows = [["dp x pp x tp", "settings", "GB", "step", "atoms/s", "of peak", "limited by"]]
    for plan in plans[:limit]:
        layout, r = plan.layout, plan.rates
        rows.append(
            [
                f"{layout.dp} x {layout.pp} x {layout.tp}",
                settings_of(layout),
                f"{plan.peak.total / 1e9:.3g}",
                seconds(plan.times.step),
                f"{r.atoms_per_second:,.4g}",
                f"{100 * r.of_peak:.3g} %",
                limit_of(plan),
            ]
        )
    lines = table(rows) if plans else ["no layout fits"]
    fitting = {(p.layout.dp, p.layout.pp, p.layout.tp) for p in plans}
    nearest: dict[tuple[int, int, int], Failure] = {}
    for failure in failures:
        best = nearest.get(failure.grid)
        if best is None or (failure.shortage or math.inf) < (best.shortage or math.inf):
            nearest[failure.grid] = failure
    for words, fits in (
        ("grids without a layout", False),
        ("settings that do not fit where others do", True),
    ):
        some = [failure for grid, failure in nearest.items() if (grid in fitting) == fits]
        if some:
            lines += ["", f"{words}, of each grid the one that comes nearest:"]
            lines += [
                f"  {' x '.join(map(str, f.grid))} ({f.settings}): {f.reason}" for f in some[: 2 * limit]
            ]
    return "\n".join(lines)


def to_json(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """The same with plain values: bytes, seconds, operations."""
    layout, t, r = plan.layout, plan.times, plan.rates
    parallel = layout.config.parallel
    return {
        "cluster": cluster.name,
        "parameters": layout.num_parameters,
        "ranks": layout.num_ranks,
        "grid": {"data": layout.dp, "pipeline": layout.pp, "tensor": layout.tp},
        "settings": {
            "zero_stage": parallel.zero_stage,
            "plan": layout.edge_plan if layout.tp > 1 else None,
            "schedule": layout.config.schedule if layout.pp > 1 else None,
            "recompute_layers": layout.model.recompute_layers,
            "edge_memory": getattr(layout.model, "edge_memory", None),
            "offload": layout.config.optim.offload,
            "accumulate_steps": layout.micro_batches,
        },
        "memory": {m.name: {**m.num_bytes, "all": m.total} for m in plan.moments},
        "peak_bytes": plan.peak.total,
        "limit_bytes": cluster.memory_limit,
        "fault": fault(layout, plan.peak, cluster)[0],
        "seconds": {
            "step": t.step,
            "layers": t.compute,
            "tensor": t.tensor,
            "bubble": t.bubble,
            "data": t.data,
            "update": t.update,
        },
        "flops": t.flops,
        "executed_flops_of_rank": t.executed,
        "sent_bytes_of_rank": {**t.sent._asdict(), **link_bytes(layout, cluster, t.sent)},
        **dataclasses.asdict(r),
    }


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, numbers to the right, the first to the left."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    left = [
        k == 0 or not any(c[:1].isdigit() for c in (row[k] for row in rows[1:])) for k in range(len(widths))
    ]
    return [
        "  ".join(
            cell.ljust(w) if is_left else cell.rjust(w)
            for cell, w, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]
