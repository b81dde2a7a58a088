"""Non-negative orthogonal matching pursuit, batched over rows.

Each row picks, one after another, the atom that correlates most with what is left of it, and
refits all picked atoms by least squares after every pick. `eager.matching_pursuit` says so in
the fewest lines; here the same is done from inner products of atoms (Batch-OMP: Rubinstein,
Zibulevsky and Elad 2008, with a progressive Cholesky factor), and for a few candidates a row.

Shape letters besides those of the room: m candidates of a row, t picks made so far.
"""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.kernels.codes import Codes, SparsityPattern

ROWS_AT_ONCE = 512
"""Rows whose working set (candidates x picks) still fits a processor's cache."""
CANDIDATES_PER_PICK = 6
"""How many of the best-correlated atoms a row looks at, for each pick of a stage."""
MIN_CANDIDATES = 64
"""Candidates of a row at least."""
STAGES = 3
"""How often candidates are drawn from all atoms; between draws a row picks from those it has."""
DEPENDENT = 1e-4
"""Squared length below which what is new in an atom, beside those picked, counts as rounding."""


def matching_pursuit(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "d_sae d"],
    k: int,
    tolerance: float = 0.0,
    *,
    selection_dtype: torch.dtype | None = None,
) -> Codes:
    """Codes of at most k non-negative entries a row, whose product with `atoms` is near `x`.

    Args:
        x: Rows to decompose.
        atoms: Directions of length 1.
        k: Picks per row at most.
        tolerance: A row stops once what is left is shorter than this share of it.
        selection_dtype: Dtype of the correlations with all atoms, which only propose candidates;
            None: that of `x`.
    """
    gram = atoms @ atoms.T
    searched = atoms.to(selection_dtype or atoms.dtype)
    parts = [_pursue(part, atoms, searched, gram, k, tolerance) for part in x.split(ROWS_AT_ONCE)]
    latents = torch.cat([latents for latents, _ in parts])
    values = torch.cat([values for _, values in parts])
    kept = (values > 0).flatten()
    pattern = SparsityPattern.from_top_k(latents, len(atoms))
    return Codes(pattern.where(kept), values.flatten()[kept])


def _pursue(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "d_sae d"],
    searched: Float[Tensor, "d_sae d"],
    gram: Float[Tensor, "d_sae d_sae"],
    k: int,
    tolerance: float,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The picks of each row in their order, and their codes; 0 for picks never made."""
    n, d_sae = len(x), len(atoms)
    picked = torch.zeros(n, k, dtype=torch.int64, device=x.device)
    # x ~ sum_t weight_t direction_t, directions being what is new in each pick, at length 1.
    weights = x.new_zeros(n, k)
    factor = torch.eye(k, dtype=x.dtype, device=x.device).repeat(n, 1, 1)
    left = x.square().sum(1)
    enough = (tolerance * tolerance) * left
    active = left > enough
    residual = x
    bounds = sorted({round(k * (2**stage - 1) / (2**STAGES - 1)) for stage in range(STAGES + 1)})
    for low, high in pairwise(bounds):
        m = min(d_sae, max(MIN_CANDIDATES, CANDIDATES_PER_PICK * (high - low)) + low)
        correlations = residual.to(searched.dtype) @ searched.T
        candidates = correlations.topk(m, dim=1, sorted=False).indices
        scores = torch.einsum("nmd,nd->nm", atoms[candidates], residual)
        # What of each candidate lies along the directions so far: [n, t, m].
        along = x.new_empty(n, high, m)
        if low:
            inner = gram[picked[:, :low, None], candidates[:, None, :]]
            along[:, :low] = torch.linalg.solve_triangular(
                factor[:, :low, :low], inner, upper=False
            )
        fresh = 1 - along[:, :low].square().sum(1)
        rows = torch.arange(n, device=x.device)
        for t in range(low, high):
            scores.masked_fill_(fresh < DEPENDENT, -torch.inf)
            best, at = scores.max(1)
            active = active & (best > 0)
            chosen = candidates[rows, at]
            length = fresh[rows, at].clamp_min(DEPENDENT).sqrt()
            before = along[rows, :t, at]
            direction = gram[chosen[:, None], candidates]
            if t:
                direction = direction - torch.bmm(before[:, None], along[:, :t]).squeeze(1)
            direction = direction / length[:, None]
            weight = torch.where(active, best / length, 0.0)
            along[:, t] = direction
            picked[:, t] = chosen
            weights[:, t] = weight
            factor[:, t, :t] = before
            factor[:, t, t] = length
            scores = scores - weight[:, None] * direction
            fresh = fresh - direction.square()
            scores[rows, at] = -torch.inf
            fresh[rows, at] = 0
            left = left - weight.square()
            active = active & (left > enough)
        values = _solve(factor[:, :high, :high], weights[:, :high])
        if high < k:
            residual = x - torch.bmm(values[:, None], atoms[picked[:, :high]]).squeeze(1)
    return picked, _without_negative(values, factor, weights)


def _solve(factor: Float[Tensor, "n t t"], weights: Float[Tensor, "n t"]) -> Float[Tensor, "n t"]:
    """Codes of the picked atoms, given the weights of the directions that they span."""
    upper = factor.transpose(1, 2)
    solved: Tensor = torch.linalg.solve_triangular(upper, weights[:, :, None], upper=True)
    return solved.squeeze(2)


def _without_negative(
    values: Float[Tensor, "n k"], factor: Float[Tensor, "n k k"], weights: Float[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Codes in which picks that came out negative are dropped and the others refitted."""
    rows = (values < 0).any(1).nonzero().squeeze(1)
    kept: Bool[Tensor, "r k"] = values[rows] != 0
    while len(rows):
        kept &= values[rows] > 0
        lower = factor[rows]
        # Dropped picks become their own equation, 1 * 0 = 0.
        both = kept[:, :, None] & kept[:, None, :]
        products = torch.where(both, lower @ lower.transpose(1, 2), 0.0)
        products.diagonal(dim1=1, dim2=2).masked_fill_(~kept, 1.0)
        inner = torch.where(kept, torch.bmm(lower, weights[rows, :, None]).squeeze(2), 0.0)
        values[rows] = torch.linalg.solve(products, inner)
        still = (values[rows] < 0).any(1)
        rows, kept = rows[still], kept[still]
    return values
