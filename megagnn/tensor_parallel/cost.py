"""What each plan sends, and which one sends less."""

from __future__ import annotations

from typing import Any, Literal

from megagnn.config import ModelConfig
from megagnn.parallel.context import ParallelContext
from megagnn.tensor_parallel.edge_operation import Plan

PlanChoice = Literal["auto", "channel", "edge"]


def choose_plan(
    choice: PlanChoice, config: ModelConfig, batch: dict[str, Any], context: ParallelContext
) -> Plan | None:
    """The plan for a batch; None on one rank."""
    if context.tp_size == 1:
        return None
    return "edge" if choice == "auto" else choice
