"""The types of a run's numbers: weights and activations, geometry, and what the optimizer keeps."""

from dataclasses import dataclass

import torch

from megagnn.ops.dispatch import accumulator_type

PARAMETER_TYPES = ("float32", "float64", "bfloat16")
GEOMETRY_TYPES = ("float32", "float64")


@dataclass(frozen=True)
class Precision:
    """Types of a run's numbers, and their cost in memory (docs/precision.md).

    | quantity | type |
    |---|---|
    | weights; node features, messages and their cotangents between operations | `parameters` |
    | positions, cells, vectors, distances, envelope, coordinate updates; forces, stress | `geometry` |
    | distance features and products of edges inside the fused operation | `edge` |
    | sums over neighbours, mean squares of RMSNorm, gradients of the embedding | `sums`, rounded once |
    | energies of atoms and structures, losses | float64 (the last product of the head: `sums`) |
    | gradients as the sharded optimizer adds them, over backwards and ranks | `gradients` |
    | Adam's moments, and the weights that its steps add up in | `gradients`, `master` |

    Bytes that N parameters take, with their gradients and the optimizer's state, on each of P data-parallel
    ranks, by ZeRO stage:

    | parameters | 0 | 1 | 2 | 3 |
    |---|---|---|---|---|
    | float32 | 16 N | 8 N + 8 N/P | 4 N + 12 N/P | 16 N/P |
    | bfloat16 | 18 N | 6 N + 12 N/P | 2 N + 16 N/P | 18 N/P |

    So bfloat16 takes *more* for weights at stages 0 and 3 (master weights come on top) and less at 1 and 2
    with many ranks. It halves what layers keep for the backward, and what travels of weights and features.

    Raises ValueError for other types, and for geometry narrower than the parameters.
    """

    parameters: torch.dtype = torch.float32
    """Type of weights and activations."""
    geometry: torch.dtype = torch.float32
    """Type of positions and all that is computed from them without weights: float32 or float64."""

    def __post_init__(self) -> None:
        for name, known in (("parameters", PARAMETER_TYPES), ("geometry", GEOMETRY_TYPES)):
            if type_name(getattr(self, name)) not in known:
                raise ValueError(
                    f"Precision: {name} must be one of {list(known)}, got {type_name(getattr(self, name))}"
                )
        if self.geometry.itemsize < self.parameters.itemsize:
            raise ValueError(
                f"Precision: geometry must be at least as wide as the parameters, got {self}; use float64 "
                "geometry or float32 parameters"
            )

    def __str__(self) -> str:
        return f"{type_name(self.parameters)}, geometry {type_name(self.geometry)}"

    @property
    def edge(self) -> torch.dtype:
        """Type of the fused edge operation's arithmetic: float64 beside float64 parameters, else float32."""
        return self.sums

    @property
    def sums(self) -> torch.dtype:
        """Type in which activations are summed: float32 for bfloat16, else the type of the parameters."""
        return accumulator_type(self.parameters)

    @property
    def gradients(self) -> torch.dtype:
        """Type of gradients as they are added up, and of Adam's moments."""
        return self.sums

    @property
    def master(self) -> torch.dtype | None:
        """Type of the weights that steps add up in, where it is not that of the parameters."""
        return self.sums if self.sums != self.parameters else None


def type_name(dtype: torch.dtype) -> str:
    """float32 of torch.float32."""
    return str(dtype).removeprefix("torch.")


def precision_of(dtype: str | torch.dtype | Precision, geometry: str | None = None) -> Precision:
    """The precision of `train.dtype` and `train.geometry`.

    Without `geometry` it is float64 beside float64 and else float32. Raises ValueError as `Precision`.
    """
    if isinstance(dtype, Precision):
        return dtype
    parameters = _type(dtype)
    return Precision(parameters, accumulator_type(parameters) if geometry is None else _type(geometry))


def _type(name: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype):
        raise ValueError(f"Precision: types are {list(PARAMETER_TYPES)}, got {name!r}")
    return found
