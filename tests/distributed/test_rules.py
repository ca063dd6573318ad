"""Any update rule trains alike in one process and by ZeRO on two ranks, and its state moves between them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megagnn.config import config_from_dict
from megagnn.optim.rule import Rule
from megagnn.optim.rules import RULES
from megagnn.parallel.context import ParallelContext, grid_context
from tests.distributed import sharded
from tests.distributed.sharded import Case, build, on_rank, optimizer_of, train, worst
from tests.distributed.spawn import spawn
from tests.optim import toy_rules  # noqa: F401 (registers the rules)

PARITY = 1e-10
STATE = {"lion": {"momentum"}, "normalised": {"exp_avg", "exp_avg_sq", "velocity", "rows"}}
CASES = [
    Case(dp, tp, stage, rule=rule)
    for dp, tp in ((2, 1), (1, 2))
    for rule in STATE
    for stage in range(4)
    if (rule == "normalised" and (dp == 2 or stage % 2)) or (dp == 2 and stage == 2)
]


def pieces_of(case: Case, context: ParallelContext) -> list[Any]:
    """The pieces that a rank keeps, their state filled with numbers that tell their places in the whole."""
    optimizer = optimizer_of(build(case, context), case, context)
    found = optimizer.pieces()
    for piece in (p for p in found if p.kind != "model"):
        piece.values.copy_(torch.arange(piece.begin, piece.end) + 1000 * piece.layout.index)
    return [(p.kind, p.name, p.layout, p.begin, p.end, p.of_one_rank, p.values.clone()) for p in found]


def both(context: ParallelContext) -> Any:
    """What training gives in each case, and the pieces of each layout in stage 2."""
    kept = {
        (dp, tp): pieces_of(Case(dp, tp, 2, rule="normalised"), grid_context(dp, 1, tp))
        for dp, tp in ((2, 1), (1, 2))
    }
    return on_rank(context, CASES, 5), kept


@pytest.fixture(scope="module")
def ranks() -> Any:
    return spawn(2, both)


def one_process(rule: str, num_steps: int = 5, stage: int = 0) -> dict[str, Any]:
    return train(Case(1, 1, stage, rule=rule), ParallelContext(), num_steps)


def test_layouts_equal_one_process(ranks: Any) -> None:
    plain = {rule: one_process(rule) for rule in STATE}
    for found, _ in ranks:
        for case, got in zip(CASES, found, strict=True):
            assert worst(got["final"], plain[case.rule]["final"]) <= PARITY, str(case)
    assert worst(plain["lion"]["final"], plain["normalised"]["final"]) > 1e-6


def test_stages_1_to_3_give_the_same_bits(ranks: Any) -> None:
    for found, _ in ranks:
        by_stage = {case: got["final"] for case, got in zip(CASES, found, strict=True)}
        for case, got in by_stage.items():
            if case.stage > 1 and case._replace(stage=1) in by_stage:
                assert worst(got, by_stage[case._replace(stage=1)]) == 0, str(case)


def test_a_slice_updated_alone_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of each matrix updated by itself is far outside the tolerance."""
    want = one_process("normalised")["final"]
    matrices = RULES["normalised"].matrices
    assert matrices is not None

    def halves(gradients: Any, states: Any, settings: Any, step: int) -> list[torch.Tensor]:
        cut = [half for g in gradients for half in g.chunk(2)]
        of_halves = [
            {"velocity": v, "rows": r}
            for s in states
            for v, r in zip(s["velocity"].chunk(2), s["rows"].chunk(2), strict=True)
        ]
        found = matrices.directions(cut, of_halves, settings, step)
        return [torch.cat(found[2 * i : 2 * i + 2]) for i in range(len(gradients))]

    monkeypatch.setitem(
        RULES, "normalised", Rule(RULES["normalised"].elements, replace(matrices, directions=halves))
    )
    assert worst(one_process("normalised")["final"], want) > 1e6 * PARITY


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)])
def test_pieces_are_the_whole_state_once(ranks: Any, layout: tuple[int, int]) -> None:
    """Matrices lie on one rank each, and both have some; other layouts read the same numbers."""
    whole = {
        (kind, name): (of.full_shape, values.clone())
        for kind, name, of, *_, values in pieces_of(Case(1, 1, 1, rule="normalised"), ParallelContext())
    }
    assert {kind for kind, _ in whole} == {"model", *STATE["normalised"]}
    matrices = {name for kind, name in whole if kind == "velocity"}
    assert matrices
    for kind in ("velocity", "rows"):
        held = [
            [(name, begin, end, values) for k, name, _, begin, end, _, values in kept[layout] if k == kind]
            for _, kept in ranks
        ]
        assert all(held)
        assert sorted(name for of_rank in held for name, *_ in of_rank) == sorted(matrices)
        for name, begin, end, values in (item for of_rank in held for item in of_rank):
            assert (begin, end) == (0, len(values))
            assert torch.equal(values, whole[kind, name][1])
    assert not matrices & {name for kind, name in whole if kind == "exp_avg"}
    sizes = [sum(len(p[-1]) for p in kept[layout] if p[0] in STATE["normalised"]) for _, kept in ranks]
    largest = max(values.numel() for (kind, _), (_, values) in whole.items() if kind == "velocity")
    assert abs(sizes[0] - sizes[1]) <= 2 * largest


@pytest.mark.parametrize("rule", STATE)
def test_offloaded_state_gives_the_same_bits(
    rule: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = one_process(rule, 3, stage=2)
    settings = {**sharded._SETTINGS, "offload": "disk", "offload_dir": str(tmp_path)}
    monkeypatch.setattr(sharded, "_SETTINGS", settings)
    assert worst(one_process(rule, 3, stage=2)["final"], want["final"]) == 0


def test_lion_by_hand() -> None:
    """The document's rule: two steps from zero momentum, with decay, on numbers of either sign."""
    weights, momentum = torch.tensor([1.0, -2.0]), torch.zeros(2)
    settings = {"lr": 0.1, "betas": (0.9, 0.5), "weight_decay": 0.5}
    for step, grad in ((1, [4.0, -2.0]), (2, [-2.0, -2.0])):
        RULES["lion"].elements.update(
            weights, torch.tensor(grad), {"momentum": momentum}, None, settings, step, 0.5
        )
    assert momentum.tolist() == pytest.approx([0.0, -0.75])
    assert weights.tolist() == pytest.approx([(0.95 - 0.1) * 0.95 - 0.1, (-1.9 + 0.1) * 0.95 + 0.1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "adam"}, r"optim.rule must be one of adamw.*got 'adam'"),
        (
            {"rule": "lion", "implementation": "torch"},
            "'lion' needs optim.implementation = 'own'",
        ),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"data": {"paths": ["a.xyz"]}, "optim": settings})
