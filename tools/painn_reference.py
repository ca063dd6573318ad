"""Energies, forces and parameter gradients of schnetpack's PaiNN, with weights under this project's names.

    python tools/painn_reference.py tests/models/painn/schnetpack.npz

needs schnetpack (2.1.1 made the file that is kept). tests/models/painn/test_schnetpack.py compares with the
file, and with schnetpack itself where it is installed.
"""

import sys
from typing import Any

import numpy as np
import torch
from ase.build import bulk, molecule
from torch import Tensor

from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.painn.config import PaiNNConfig
from megagnn.models.statistics import Statistics

WIDTH, LAYERS, RADIAL, CUTOFF = (
    4,
    3,
    9,
    4.0,
)  # Gaussians 0.5 Å apart, which schnetpack's float32 holds exactly
BASES = ("bessel", "gaussian")
STATISTICS = Statistics(
    elements=(1, 6, 8, 13, 29),
    sources=("any",),
    levels=("any",),
    source_elements=((1, 6, 8, 13, 29),),
    source_levels=((0,),),
    references=((0.0,) * 5,),
    mean_energy=(0.0,),
    mean_neighbours=12.0,
    output_scale=1.0,
)
Tensors = dict[str, Tensor]


def config(basis: str) -> PaiNNConfig:
    """The configuration that is schnetpack's model."""
    sizes = {"width": WIDTH, "num_layers": LAYERS, "num_radial": RADIAL, "cutoff": CUTOFF}
    section = {"family": "painn", "preset": "published", "radial_basis": basis, **sizes}
    found: Any = config_from_dict({"model": section}).model
    return found


def batch() -> Tensors:
    """A molecule, and a crystal with several images of the same neighbour."""
    crystal = bulk("Cu", "fcc", a=3.6) * (2, 1, 1)
    crystal.symbols[1] = "Al"
    structures = [molecule("CH3CH2OH"), crystal]
    for number, atoms in enumerate(structures):
        atoms.rattle(0.08, seed=number + 1)
    return batch_from_atoms(structures, CUTOFF, torch.float64)


def loss(energy_B: Tensor, forces_NC: Tensor) -> Tensor:
    """Of which the gradients are."""
    return energy_B.square().sum() + (forces_NC * torch.sin(forces_NC)).sum()


def schnetpack_model(basis: str) -> torch.nn.ModuleDict:
    """Its PaiNN and energy head in float64, with random weights and biases."""
    loader: Any = torch.utils.data.dataloader
    if not hasattr(loader, "T_co"):  # schnetpack 2.1 imports a name that newer PyTorch has no more
        loader.T_co = Any
    from schnetpack import nn
    from schnetpack.atomistic import Atomwise
    from schnetpack.representation import PaiNN

    before = torch.get_default_dtype()
    torch.manual_seed(7)
    radial = nn.GaussianRBF(RADIAL, CUTOFF)
    torch.set_default_dtype(torch.float64)  # for the frequencies
    try:
        if basis == "bessel":
            radial = nn.BesselRBF(RADIAL, CUTOFF)
        net = PaiNN(WIDTH, LAYERS, radial, nn.CosineCutoff(CUTOFF))
        model = torch.nn.ModuleDict({"net": net, "head": Atomwise(WIDTH, output_key="energy")})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    finally:
        torch.set_default_dtype(before)
    return model.double()


def schnetpack_result(basis: str) -> Tensors:
    """`weight NAME`, `gradient NAME`, energy (B,) and forces (N, 3) of schnetpack's model."""
    model, b = schnetpack_model(basis), batch()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # its vectors begin as zeros of the default type
    try:
        i, j = b[keys.EDGE_INDEX]
        x_NC = b[keys.POSITIONS].clone().requires_grad_()
        cell_E33 = b[keys.CELL][b[keys.BATCH][i]]
        shift_EC = (b[keys.CELL_SHIFTS].unsqueeze(-1) * cell_E33).sum(-2)
        inputs = {
            "_atomic_numbers": b[keys.ATOMIC_NUMBERS],
            "_Rij": x_NC[j] + shift_EC - x_NC[i],
            "_idx_i": i,
            "_idx_j": j,
            "_idx_m": b[keys.BATCH],
        }
        energy_B = model["head"](model["net"](inputs))["energy"]
        (gradient_NC,) = torch.autograd.grad(energy_B.sum(), x_NC, create_graph=True)
        loss(energy_B, -gradient_NC).backward()
    finally:
        torch.set_default_dtype(before)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }
    scale = CUTOFF if basis == "bessel" else 1.0  # our Bessel functions are c times theirs
    found = {f"weight {name}": w for name, w in converted(weights, 1 / scale).items()}
    found |= {f"gradient {name}": g for name, g in converted(gradients, scale).items()}
    for name in ("net.filter_net.weight", "net.interactions.0.interatomic_context_net.1.weight"):
        assert gradients[name][2 * WIDTH : 3 * WIDTH].abs().max() == 0, (
            "what this project leaves out is not 0"
        )
    return {**found, "energy": energy_B.detach(), "forces": -gradient_NC.detach()}


def converted(theirs: Tensors, filter_scale: float) -> Tensors:
    """Weights or gradients under this project's names; without those of schnetpack that no output reads."""
    net = {name.removeprefix("net."): value for name, value in theirs.items()}
    ours = {"element_embedding.weight": net["embedding.weight"][list(STATISTICS.elements)]}
    for k in range(LAYERS):
        at, inter, mixing = f"layers.{k}.", f"interactions.{k}.interatomic_", f"mixing.{k}.intraatomic_"
        for kind, scale in (("weight", filter_scale), ("bias", 1.0)):
            filters = net[f"filter_net.{kind}"].chunk(LAYERS)[k].chunk(3)
            messages = net[f"{inter}context_net.1.{kind}"].chunk(3)
            updates = net[f"{mixing}context_net.1.{kind}"].chunk(3)
            for n, name in enumerate(("h", "u", "v") if k else ("h", "u")):
                ours[f"{at}filters.{name}.{kind}"] = filters[n] * scale
                ours[f"{at}message.out.{name}.{kind}"] = messages[n]
            ours[f"{at}message.hidden.0.{kind}"] = net[f"{inter}context_net.0.{kind}"]
            for n, name in enumerate(("h", "v", "pq")):
                if name != "v" or k < LAYERS - 1:
                    ours[f"{at}update.out.{name}.{kind}"] = updates[n]
        first, second = net[f"{mixing}context_net.0.weight"].chunk(2, 1)
        ours |= {f"{at}update.hidden.0.weight": first, f"{at}update.hidden.1.weight": second}
        ours[f"{at}update.hidden.0.bias"] = net[f"{mixing}context_net.0.bias"]
        ours[f"{at}p.weight"], ours[f"{at}q.weight"] = net[f"mixing.{k}.mu_channel_mix.weight"].chunk(2)
    for n, name in enumerate(("hidden", "out")):
        for kind in ("weight", "bias"):
            ours[f"energy_head.{name}.{kind}"] = net[f"head.outnet.{n}.{kind}"]
    return ours


if __name__ == "__main__":
    results = {basis: schnetpack_result(basis) for basis in BASES}
    arrays = {f"{basis} {key}": value.numpy() for basis in BASES for key, value in results[basis].items()}
    np.savez_compressed(sys.argv[1], **arrays)
