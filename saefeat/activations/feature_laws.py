"""How dense features are, which depend on which, and how strongly they fire.

Shape letters: n features, nnz entries of codes.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.activations.random_draws import RandomDraws

MAGNITUDES = ("constant", "uniform", "half_normal", "log_normal")
"""Laws of how strongly a feature fires; see `draw_magnitudes`."""
MOST_OF_PARENT = 0.5
"""Highest density of a child as a share of its parent's: a child that is on whenever its parent
is on could not be told from it."""
LOG_NORMAL_SIGMA = 0.5
"""Standard deviation of the logarithm of log-normal magnitudes."""


def spread_densities(
    n: int, mean: float, distribution: str, *, zipf_exponent: float, density_ratio: float
) -> Float[Tensor, " n"]:
    """Densities of a law, in descending order, with the mean that is asked for.

        constant       p_i = mean
        zipf           p_i ∝ (i + 1)^-zipf_exponent
        log_uniform    p_i ∝ density_ratio^-(i / (n - 1)): evenly spaced on a logarithmic scale

    Raises:
        ValueError: There is no such law, or the largest density would pass 1.
    """
    index = torch.arange(n, dtype=torch.float64)
    if distribution == "constant":
        weights = torch.ones(n, dtype=torch.float64)
    elif distribution == "zipf":
        weights = (index + 1) ** -zipf_exponent
    elif distribution == "log_uniform":
        weights = density_ratio ** -(index / max(1, n - 1))
    else:
        raise ValueError(
            f"density_distribution={distribution!r} is unknown; use 'constant', 'zipf' or "
            "'log_uniform'."
        )
    densities = mean * weights / weights.mean()
    if (densities > 1).any():
        raise ValueError(
            f"A mean density of {mean} over {n} features that are distributed as {distribution} "
            f"puts the largest at {float(densities[0]):.3g}, above 1. Lower the density, or make "
            "the densities less unequal."
        )
    return densities


def given_densities(
    densities: Float[Tensor, " _"], n: int, distribution: str
) -> Float[Tensor, " n"]:
    """The densities that a caller gives, checked, in float64.

    Raises:
        ValueError: There are not n, or a distribution is asked for besides.
    """
    if distribution != "constant":
        raise ValueError(
            f"density_distribution={distribution!r} spreads a mean, but density gives each "
            "feature its own. Give one or the other."
        )
    if len(densities) != n:
        raise ValueError(
            f"density holds {len(densities)} numbers, but {n} features are in no pair: give a "
            "mean, or one number for each of those."
        )
    return densities.detach().double().cpu()


def draw_parents(
    densities: Float[Tensor, " n"], share: float, generator: np.random.Generator
) -> Int[Tensor, " n"]:
    """The parent of each feature; -1 for none.

    The least dense features, a `share` of all, are the children. Each draws its parent among the
    others that are at least twice as dense as itself, so that P(child | parent), which is the
    ratio of their densities, is at most a half. Parents have no parents themselves.

    Raises:
        ValueError: A child finds no parent that is dense enough.
    """
    parents = torch.full((len(densities),), -1)
    n_children = round(share * len(densities))
    if n_children == 0:
        return parents
    order = densities.argsort(descending=True, stable=True)
    others, children = order[:-n_children], order[-n_children:]
    needed = densities[children] / MOST_OF_PARENT
    n_able = np.searchsorted(-densities[others].numpy(), -needed.numpy(), side="right")
    if n_able.min() == 0:
        densest = float(densities[others].max()) if len(others) else 0.0
        raise ValueError(
            f"hierarchy={share} makes {n_children} features children, and "
            f"{int((n_able == 0).sum())} of them find no parent: it has to be at least twice as "
            f"dense as its child, and the densest is {densest:.3g}. Make fewer children, or "
            "densities less equal (density_distribution='zipf' or 'log_uniform')."
        )
    parents[children] = others[torch.from_numpy(generator.integers(0, n_able))]
    return parents


def draw_blocks(
    features: Int[Tensor, " k"], n: int, block_size: int, generator: np.random.Generator
) -> Int[Tensor, " n"]:
    """The block of each feature; -1 for none. What is left over makes a smaller block."""
    blocks = torch.full((n,), -1)
    mixed = torch.from_numpy(generator.permutation(len(features)))
    blocks[features[mixed]] = torch.arange(len(features)) // block_size
    return blocks


def draw_magnitudes(law: str, n: int, draws: RandomDraws) -> Float[Tensor, " n"]:
    """How strongly n features that are on fire, of mean 1 and above 0.

    constant       1
    uniform        uniform on [0.5, 1.5)
    half_normal    |N(0, 1)| sqrt(pi / 2)
    log_normal     exp(s N(0, 1) - s² / 2),  s = 0.5
    """
    if law == "uniform":
        return draws.uniform(n) + 0.5
    values = draws.normal(n)
    if law == "half_normal":
        values = values.abs_() * math.sqrt(math.pi / 2)
        # A code of exactly 0 would count as off.
        return values.clamp_(min=torch.finfo(values.dtype).tiny)
    if law == "log_normal":
        return values.mul_(LOG_NORMAL_SIGMA).sub_(LOG_NORMAL_SIGMA**2 / 2).exp_()
    return torch.ones_like(values)


def check_directions(directions: Float[Tensor, "..."], n_features: int, d_in: int) -> None:
    """Refuse what are no unit vectors, one for each feature."""
    if directions.shape != (n_features, d_in):
        raise ValueError(
            f"directions has shape {list(directions.shape)}, not [n_features, d_in] = "
            f"{[n_features, d_in]}."
        )
    error = float((directions.norm(dim=1) - 1).abs().max())
    if not error < 1e-4:
        raise ValueError(
            f"directions must be unit vectors, and the norm of one is {error:.3g} from 1. Divide "
            "each by its norm; how strongly features fire is for `magnitude` to say."
        )
