"""What a layer costs beside its arithmetic: what its ranks send, and what it keeps in memory.

A family says both for each of its layers (`Model.traffic`, `Model.kept`), from its configuration alone; plans
of runs that are too large to try, and the tests that hold them against what was sent and kept, read them.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

How = Literal["plain", "probe", "pair", "graph"]
"""What a forward is for: `plain` for a backward to the parameters, `probe` for one to the positions alone,
`pair` on values and tangents, `graph` for a gradient that is differentiated again (docs/forces.md)."""
EdgePlan = Literal["channel", "edge"]


class Pass(NamedTuple):
    """Elements that a rank sends in one layer, forward and backward."""

    forward: Fraction
    backward: Fraction


@dataclass(frozen=True)
class Setting:
    """A batch on tensor-parallel ranks, and how the backward gets its intermediates."""

    ranks: int
    planes: int
    """1 for values, 2 for pairs of value and tangent."""
    num_atoms: int
    own_atoms: Fraction | int
    """Rows of this rank under the plan `edge`."""
    num_edges: int
    blocks_again: bool = False
    """`edge_memory = "recompute"`."""
    layers_again: bool = False
    """`recompute_layers`."""
    weights_wanted: bool = True
    """Whether the backward is one to the parameters, and not to the positions alone."""

    @property
    def u(self) -> Fraction:
        """(t-1)/t."""
        return Fraction(self.ranks - 1, self.ranks)


class Kept(NamedTuple):
    """Numbers of the features' type that a layer's forward leaves for its backward, on one of the
    tensor-parallel ranks, and what exists beside them while the layer is at work.

    They are what PyTorch's allocator counts on a CPU, numbers without a factor of a width rounded.
    """

    per_atom: float
    per_edge: float
    fixed: float = 0.0
    """Whatever the batch is: copies of weights."""
    work_per_atom: float = 0.0
    work_per_edge: float = 0.0
    work_fixed: float = 0.0
