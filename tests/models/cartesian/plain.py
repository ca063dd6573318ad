"""The Cartesian family a second time: one process, tensors as 3 x 3 matrices, derivatives by autograd alone.

Shares no code with the package but the batch; parameters by their names. Features are (N, ..., F).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from megagnn.data import keys
from megagnn.models.cartesian.config import CartesianConfig
from megagnn.models.statistics import Statistics

Parameters = dict[str, Tensor]
FACTORS = {2: 1, 1: 1, 3: 1.5, 4: 3, 5: 3, 6: 4.5, 7: 1, 8: 9 / 5, 9: 7.5, 10: 7.5, 11: 45 / 4, 12: 3}
FACTORS |= {13: 90 / 17, 14: 1}
"""Squares of the paths' constants."""
PATHS = {"full": range(1, 15), "lean": (1, 4, 7, 9, 14), "painn": (1, 4, 7)}
RANGES = {"h": range(1, 4), "v": range(4, 9), "t": range(9, 15)}


def energies(parameters: Parameters, config: CartesianConfig, statistics: Statistics, batch: Any) -> Tensor:
    """Energies of the structures without the elements' references, eV, (B,)."""
    i, j = batch[keys.EDGE_INDEX]
    shift_EC = torch.einsum("ek,ekc->ec", batch[keys.CELL_SHIFTS], batch[keys.CELL][batch[keys.BATCH][i]])
    r_EC = batch[keys.POSITIONS][j] + shift_EC - batch[keys.POSITIONS][i]
    d_E = torch.sqrt((r_EC * r_EC).sum(-1) + 1e-6)
    s = d_E / config.cutoff
    envelope_E = (1 - 28 * s**6 + 48 * s**7 - 21 * s**8) * (s < 1)
    n_R = torch.arange(1, config.num_radial + 1, dtype=torch.float64)
    basis_ER = torch.sin(n_R * math.pi * s[:, None]) / s[:, None] * envelope_E[:, None]
    if config.num_splines:
        x_EK = s[:, None] * (config.num_splines - 3) - torch.arange(-1, config.num_splines - 1)
        powers = [math.comb(4, k) * (-1) ** k * torch.relu(x_EK + 2 - k) ** 3 / 6 for k in range(5)]
        size_E = (config.num_radial / 2) ** 0.5 / torch.sqrt(s * s + 1 / 400) * envelope_E
        basis_ER = torch.stack(powers).sum(0) * size_E[:, None]
    element_N = torch.tensor([statistics.elements.index(z) for z in batch[keys.ATOMIC_NUMBERS].tolist()])
    level_N = batch[keys.LEVEL][batch[keys.BATCH]]
    state = {"h": parameters["element_embedding.weight"][element_N]}
    state["h"] = state["h"] + parameters["level_embedding.weight"][level_N]
    for k in range(config.num_layers):
        own = {n.removeprefix(f"layers.{k}."): p for n, p in parameters.items() if f"layers.{k}." in n}
        state = layer(own, config, statistics.mean_neighbours, state, i, j, basis_ER, r_EC / d_E[:, None])
    h = state["h"] * torch.rsqrt(state["h"].square().mean(-1, keepdim=True) + 1e-6)
    head = {n.removeprefix("energy_head."): p for n, p in parameters.items() if n.startswith("energy_head.")}
    hidden = silu(h * head["norm.gain_F"] @ head["hidden.weight"].T + head["hidden.bias"])
    energy_N = (hidden @ head["out.weight"].T + head["out.bias"])[:, 0] * statistics.output_scale
    return torch.zeros(len(batch[keys.NUM_ATOMS])).double().index_add(0, batch[keys.BATCH], energy_N)


def layer(
    p: Parameters, config: CartesianConfig, neighbours: float, state: Parameters, i: Any, j: Any, *edges: Any
) -> Parameters:
    """One layer; of `t` the first and the second index are dimensions 1 and 2."""
    inverse_N = torch.rsqrt(mean_square(state) + 1e-6)
    n = {name: times(x, inverse_N) * p[f"norm.gains.{name}"] for name, x in state.items()}
    a = {name: x @ p[f"up.{name}.weight"].T for name, x in n.items()}
    r = {name: x @ p[f"residual.{name}.weight"].T for name, x in n.items()}
    a["h"], r["h"] = a["h"] + p["up.h.bias"], r["h"] + p["residual.h.bias"]
    sent = {name: x[j] for name, x in a.items()}
    for name, m in messages(p["path_weights.weight"], config.paths, sent, *edges).items():
        total = torch.zeros(len(state["h"]), *m.shape[1:], dtype=m.dtype).index_add(0, i, m)
        r[name] = r.get(name, 0) + total / neighbours**0.5
    u_h, u_v, u_t = r["h"], r["v"], r.get("t")
    c = torch.rsqrt(1 + mean_square(r))
    products = {"h.weights.vv": (u_v * u_v).sum(1)}
    if u_t is not None:
        products["h.weights.tt"] = (u_t * u_t).sum((1, 2))
        products["v.weights.tv"] = torch.einsum("nabf,nbf->naf", u_t, u_v)
        products["t.weights.vv"] = traceless(torch.einsum("naf,nbf->nabf", u_v, u_v))
        products["t.weights.tt"] = traceless(torch.einsum("nabf,nbcf->nacf", u_t, u_t))
    y = {key: times(x, c) for key, x in products.items()}
    changed = {}
    for name in r:
        if f"gates.{name}.weight" not in p:
            continue
        gate = n["h"] @ p[f"gates.{name}.weight"].T + p[f"gates.{name}.bias"] + p[f"gate_slopes.{name}"] * u_h
        gated = silu(gate) * u_h if name == "h" else times(r[name], torch.sigmoid(gate))
        mixed = {**y, f"{name}.weights.gated": gated}
        change = sum(x @ p[f"down.{key}"].T for key, x in mixed.items() if key.startswith(name))
        change = change + p[f"down.{name}.bias"] if name == "h" else change
        changed[name] = state.get(name, 0) + change / config.num_layers**0.5
    return changed


def messages(weight_PFR: Tensor, paths: str, sent: Parameters, basis_ER: Tensor, u_EC: Tensor) -> Parameters:
    """Of all edges, by field."""
    s, v, t = sent["h"], sent.get("v"), sent.get("t")
    one = [1, 4, 9] + [2, 5, 7, 10, 12] * (v is not None) + [3, 6, 8, 11, 13, 14] * (t is not None)
    numbers = [n for n in PATHS[paths] if n in one]
    w = dict.fromkeys(range(1, 15), torch.zeros_like(s))
    for into in RANGES.values():
        for n in set(into) & set(numbers):
            share = (FACTORS[n] / len(set(into) & set(numbers))) ** 0.5
            w[n] = basis_ER @ weight_PFR[numbers.index(n)].T * share
    v = torch.zeros(len(s), 3, s.shape[1], dtype=s.dtype) if v is None else v
    t = torch.zeros(len(s), 3, 3, s.shape[1], dtype=s.dtype) if t is None else t
    alpha = torch.einsum("eaf,ea->ef", v, u_EC)
    tau = torch.einsum("eabf,eb->eaf", t, u_EC)
    beta = torch.einsum("eaf,ea->ef", tau, u_EC)
    u = u_EC[:, :, None]
    found = {"h": w[1] * s + w[2] * alpha + w[3] * beta}
    found["v"] = (
        u * (w[4] * s + w[5] * alpha + w[6] * beta)[:, None] + w[7][:, None] * v + w[8][:, None] * tau
    )
    if paths != "painn":
        z = u * (w[9] * s + w[10] * alpha + w[11] * beta)[:, None] + w[12][:, None] * v + w[13][:, None] * tau
        found["t"] = traceless(torch.einsum("ea,ebf->eabf", u_EC, z)) + w[14][:, None, None] * t
    return found


def times(x: Tensor, factor: Tensor) -> Tensor:
    """Features times a number for each atom (N, 1), or each atom and channel."""
    return x * factor.view(len(x), *(1,) * (x.dim() - 2), -1)


def mean_square(state: Parameters) -> Tensor:
    """Over the components of each field, then over the fields, (N, 1); a matrix has five components."""
    sizes = {"h": 1, "v": 3, "t": 5}
    sums = [x.square().flatten(1).sum(1) / (sizes[name] * x.shape[-1]) for name, x in state.items()]
    return (torch.stack(sums).mean(0))[:, None]


def traceless(m: Tensor) -> Tensor:
    """Symmetric part of matrices (N, 3, 3, F) without its trace."""
    m = (m + m.transpose(1, 2)) / 2
    return m - torch.eye(3)[:, :, None] * torch.einsum("naaf->nf", m)[:, None, None] / 3
