"""Configurations and layouts for tests of plans."""

from typing import Any

from megagnn.config import RunConfig, config_from_dict
from megagnn.plan.layout import Layout, Sizes, make_layout

SMALL = {"width": 32, "num_layers": 4, "num_radial": 8, "cutoff": 4.0}


def config_of(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunConfig:
    return config_from_dict({"model": {**SMALL, **(model or {})}, **sections})


def layout_of(
    model: dict[str, Any] | None = None,
    ranks: int | None = None,
    sizes: Sizes | None = None,
    averages: bool = True,
    **sections: dict[str, Any],
) -> Layout:
    return make_layout(config_of(model, **sections), sizes or Sizes(100, 2000, 4, 2), ranks, averages)
