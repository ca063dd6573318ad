import time

import pytest

from megagnn.plan.cluster import load_cluster
from megagnn.plan.layout import Sizes
from megagnn.plan.report import search_text, to_json, to_text
from megagnn.plan.search import fault, grids, make_plan, search
from tests.plan.layouts import config_of, layout_of

H100, SIZES = load_cluster("8xh100"), Sizes(2048, 65536, 32)


def test_grids_make_the_ranks_within_a_node_and_the_layers() -> None:
    found = list(grids(64, 6, 8))
    assert all(dp * pp * tp == 64 and pp <= 6 and tp <= 8 for dp, pp, tp in found)
    assert len(found) == len(set(found)) == 3 * 4


def test_the_best_layout_fits_and_is_the_fastest() -> None:
    config = config_of({"width": 4096, "num_layers": 16, "forces": "direct"})
    plans, failures = search(config, SIZES, H100, 16)
    speeds = [plan.rates.atoms_per_second for plan in plans]
    assert len(plans) > 5
    assert speeds == sorted(speeds, reverse=True)
    assert all(plan.peak.total <= H100.memory_limit for plan in plans)
    batches = {plan.layout.dp * plan.layout.micro_batches for plan in plans}
    assert batches == {16}, "every layout takes the same batch"
    assert any("GB of 73.6 in the backward" in f.reason for f in failures)
    text = search_text(plans, failures, 3)
    assert "dp x pp x tp" in text
    assert "settings that do not fit where others do, of each grid" in text


def test_what_is_too_large_says_what_lacks() -> None:
    config = config_of({"width": 32768, "num_layers": 8})
    plans, failures = search(config, Sizes(512, 8192), H100, 2)
    assert not plans
    memory = [f for f in failures if f.shortage]
    assert {f.grid for f in memory} == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    text = search_text(plans, failures, 5)
    assert text.startswith("no layout fits")
    assert text.count("needs") == 3, "of each grid what comes nearest"
    plan = make_plan(layout_of({"width": 32768, "num_layers": 8}), H100)
    assert fault(plan.layout, plan.peak, H100)[0] in to_text(plan, H100)
    assert to_json(plan, H100)["fault"]


def test_a_rule_that_forbids_a_layout_is_the_reason() -> None:
    config = config_of({"width": 30, "num_layers": 4, "forces": "direct"}, optim={"accumulate_steps": 1})
    plans, failures = search(config, Sizes(100, 1000), H100, 4)
    reasons = {f.grid: f.reason for f in failures if not f.shortage}
    assert "30 is not divisible by tensor_parallel 4" in reasons[1, 1, 4]
    assert {(p.layout.dp, p.layout.pp, p.layout.tp) for p in plans} >= {(4, 1, 1), (2, 1, 2)}


def test_a_rule_is_told_in_its_words_and_hides_no_shortage() -> None:
    model = {"width": 4096, "num_layers": 12, "forces": "conservative", "edge_operation": "unfused"}
    config = config_of(model, train={"gradient_method": "create_graph"})
    plans, failures = search(config, Sizes(500, 20_000), H100, 2)
    rules = [f.reason for f in failures if not f.shortage]
    assert any(r.startswith("parallel.zero_stage = 3 needs train.gradient_method") for r in rules)
    assert not any("validation error" in r or "input_value" in r for r in rules)
    assert any(f.shortage for f in failures if f.grid == (2, 1, 1))
    assert "2 x 1 x 1 (ZeRO 0, nothing again): needs 80.4 GB" in search_text(plans, failures, 5)


@pytest.mark.parametrize(("width", "layers", "ranks"), [(64, 8, 1), (8192, 12, 1024), (32768, 14, 16384)])
def test_from_a_million_to_a_hundred_billion_in_seconds(width: int, layers: int, ranks: int) -> None:
    start = time.process_time()
    plans, _ = search(config_of({"width": width, "num_layers": layers}), SIZES, H100, ranks)
    assert plans
    assert time.process_time() - start < 15
