"""How many sparse features a layer has room for, by compressed sensing.

n features that are on with probability p can be recovered from m neurons only if
m = Omega(-n p ln p) (Do Ba et al. 2010, as Elhage et al. 2022, arXiv:2209.10652, use it). The
bound is one of growth; the constants here turn it into numbers, and say whose they are.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.special import lambertw
from torch import Tensor

from saefeat.superposition.theory.checks import check_positive

GAUSSIAN_L1_CONSTANT = 2.0
"""The constant C for which m = C n p ln(1/p) neurons are about what l1 minimisation needs to
recover sparse codes from Gaussian directions, after the threshold m = 2 k ln(n/k) with k = p n.
(Donoho and Tanner; quoted from memory, and a limit for small p.)"""


def max_degree(p: float, constant: float = 1.0) -> float:
    """The most features per neuron that can be recovered if each is on with probability p.

        psi_max(p) = 1 / (C p ln(1/p))

    C = 1 is only a convention; `GAUSSIAN_L1_CONSTANT` is that of one way to recover them.

    >>> [round(max_degree(p), 1) for p in (0.1, 0.01, 0.001)]
    [4.3, 21.7, 144.8]

    Args:
        p: P(active) = 1 - S of one feature, the same for all. Use `load` where they differ.
        constant: C.

    Raises:
        ValueError: `p` is not in (0, 1/e), where the expression falls with p as a bound has to.
            It has its minimum, e / C, at 1/e. `constant` is not above 0.
    """
    _check_sparse(p)
    check_positive("The bound", constant=constant)
    return 1 / (constant * p * math.log(1 / p))


def max_density(degree: float, constant: float = 1.0) -> float:
    """The largest density at which that many features per neuron can be recovered.

        p = exp(W_-1(-1 / (C psi)))

    the inverse of `max_degree`, by the lower branch of Lambert's W. A model twice as wide of
    equal size holds twice the features per neuron, and at the bound needs rarer ones, by 2.94,
    2.38 and 2.23 where p was 0.1, 0.01 and 0.001:

    >>> [round(p / max_density(2 * max_degree(p)), 2) for p in (0.1, 0.01, 0.001)]
    [2.94, 2.38, 2.23]

    Args:
        degree: Features per neuron, psi.
        constant: C.

    Raises:
        ValueError: `degree` is not finite or not above e / C, which `max_degree` allows at every
            p below 1/e; `constant` is not above 0.
    """
    check_positive("The bound", constant=constant)
    if not (math.e / constant < degree < math.inf):
        raise ValueError(
            f"At C = {constant} the bound says nothing of {degree} features per neuron: up to "
            f"e / C = {math.e / constant:.4g} are allowed at every density below 1/e."
        )
    return math.exp(float(lambertw(-1 / (constant * degree), k=-1).real))


def max_degree_with_square_term(p: float, n_neurons: float, constant: float = 1.0) -> float:
    """The most features per neuron if m neurons hold as much as m^2 do in `max_degree`.

        m^2 = Omega(-n p ln p),    psi_max = n / m = m / (C p ln(1/p))

    the square term with which Katta 2024 would save both statements: features of a layer then
    go with d^2, those of a model with N, whatever its shape. Computing in superposition costs
    about that (Adler and Shavit 2024, arXiv:2409.15318: m^2 parameters for m^2 features, up to
    logarithms).

    Raises:
        ValueError: As `max_degree`, or `n_neurons` is below 1.
    """
    _check_neurons(n_neurons)
    return n_neurons * max_degree(p, constant)


def load(densities: Float[Tensor, "..."] | Sequence[float], n_neurons: int) -> float:
    """How full a layer is of features that are on with unequal probabilities.

        Lambda = (1 / m) sum_i p_i ln(1 / p_i)

    `max_degree` for one density p is reached at Lambda = 1 / C: l1 minimisation recovers the
    features up to about 2 Lambda = 1 (`GAUSSIAN_L1_CONSTANT`). No unit. Features that are never
    on (p = 0) or always (p = 1) add nothing.

    The terms grow with p up to 1/e only. Above it a term is smaller than p itself, though an
    active feature takes up at least one of the m equations, so that the load of a layer with
    such features is too low, a lower bound. They are few in practice: count each as one neuron
    less, and give the load of the others.

    >>> round(2 * load([0.01] * 256, n_neurons=32), 2)
    0.74

    Args:
        densities: P(active) of each feature of the layer, as `metrics.feature_density` gives it.
        n_neurons: m, the width of the layer.

    Raises:
        ValueError: A density is outside [0, 1] or not a number, the densities are not one row,
            or `n_neurons` is below 1.
    """
    _check_neurons(n_neurons)
    p = torch.as_tensor(densities, dtype=torch.float64).detach()
    if p.ndim != 1:
        raise ValueError(
            f"Densities are one number a feature, shape [n]; got shape {tuple(p.shape)}. "
            "Give one layer at a time."
        )
    outside = ~((p >= 0) & (p <= 1))  # written so that NaN is outside
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"A density is a probability, in [0, 1]; feature {first} has {float(p[first])}, the "
            f"first of {int(outside.sum())} outside. Are they log10 densities, or counts?"
        )
    return float(torch.special.entr(p).sum()) / n_neurons


def _check_sparse(p: float) -> None:
    if not 0 < p < 1 / math.e:
        raise ValueError(
            f"The bound holds for densities in (0, 1/e = {1 / math.e:.4f}), got {p}. p ln(1/p) "
            "is largest at 1/e: past it the bound would allow more features the denser they "
            "are. Is it a sparsity S = 1 - p?"
        )


def _check_neurons(n_neurons: float) -> None:
    if not 1 <= n_neurons < math.inf:
        raise ValueError(f"A layer has at least one neuron, got n_neurons={n_neurons}.")
